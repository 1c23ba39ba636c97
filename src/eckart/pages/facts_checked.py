"""What pages show of a plan and a provenance, whose notes are free: checked here, where they are first read.

A load acts on none of it, so a note that nobody can show spoils a page and never a checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from eckart.errors import CheckpointError
from eckart.plans.plan import Plan
from eckart.support import reading
from eckart.support.reading import Count, Positive


class _Ledger(msgspec.Struct):
    target_parameters_dense: Positive
    target_parameters_kept: Count
    model_parameters_dense: Positive
    model_parameters_kept: Count
    model_bytes_dense: Positive
    model_bytes_kept: Count
    keep: float
    keep_model: float


class _Model(msgspec.Struct):
    source: str | None = None
    revision: str | None = None


class _Kl(msgspec.Struct):
    measured: float | None = None


class _Calibration(msgspec.Struct):
    spec: str
    split: str
    windows: Count
    length: Count
    tokens: Count
    join: str
    bos: str
    tokens_hash: str
    seed: int | None


class _Provenance(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)
    kl: _Kl | None = None
    calibration: _Calibration | None = None
    command: str | None = None
    ledger: dict[str, Any] | None = None


class _Asked(msgspec.Struct):
    keep: float = 0.0
    size: float = 0.0
    max_kl: float = 0.0
    rank_multiple: int = 1


class _Reached(msgspec.Struct):
    predicted_kl: float | None = None


class _MadeBy(msgspec.Struct):
    name: str | None = None
    refiners: list[dict[str, Any]] | None = None


class _Details(msgspec.Struct):
    predicted_loss: float | None = None
    energy_effective_rank: float | None = None


class _Entry(msgspec.Struct):
    details: _Details


class _Plan(msgspec.Struct):
    asked: _Asked
    reached: _Reached
    made_by: _MadeBy
    entries: list[_Entry]


def check_plan(plan: Plan, source: Path) -> None:
    """Raise `CheckpointError` when notes of a plan are not what pages can show."""
    notes = {"asked": plan.asked, "reached": plan.reached, "made_by": plan.made_by}
    entries = [{"details": entry.details} for entry in plan.entries]
    reading.checked({**notes, "entries": entries}, _Plan, CheckpointError, source)


def check_provenance(provenance: Mapping[str, Any], source: Path) -> None:
    """Raise `CheckpointError` when notes of a provenance are not what pages can show."""
    reading.checked(provenance, _Provenance, CheckpointError, source)


def check_ledger(book: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The ledger as plain data. Raises `CheckpointError` when it is not whole."""
    reading.checked(book, _Ledger, CheckpointError, f"{folder}: its ledger")
    return dict(book)
