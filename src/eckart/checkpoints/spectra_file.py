"""`spectra.json` of a checkpoint (docs/format.md): what reports show of the spectra, written once by `compress`."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from eckart.errors import CheckpointError
from eckart.support import reading
from eckart.support.not_finite import to_json
from eckart.support.reading import Count, Positive

NAME, FORMAT, VERSION = "spectra.json", "eckart-spectra", 1


def write(folder: Path, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Write a `plans.figures.summary` of each group, one a line; no file without groups."""
    if summaries:
        rows = ",\n".join(to_json(row) for row in summaries)
        text = f'{{"format": "{FORMAT}", "version": {VERSION}, "groups": [\n{rows}\n]}}\n'
        (folder / NAME).write_text(text, encoding="utf-8")


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The summaries in a checkpoint, empty if it has none. Raises `CheckpointError` when they cannot be read."""
    path = Path(folder) / NAME
    if not path.exists():
        return []
    data = reading.read_json(path, CheckpointError)
    head = reading.checked(data, _Head, CheckpointError, path)
    if head.format != FORMAT or head.version != VERSION:
        raise CheckpointError(
            f"{path}: format {reading.shown(head.format)} version {reading.shown(head.version)}, but this eckart reads "
            f"{FORMAT!r} version {VERSION}; delete the file, which only reports read, or take the eckart that wrote it."
        )
    reading.checked(data, _Spectra, CheckpointError, path)
    groups: list[dict[str, Any]] = data["groups"]
    return groups


class _Head(msgspec.Struct):
    format: Any = None
    version: Any = None


class _Group(msgspec.Struct):
    """A `plans.figures.summary`, as far as pages show it."""

    targets: Annotated[list[str], msgspec.Meta(min_length=1)]
    kind: str
    full_rank: Positive
    effective_rank: float
    stable_rank: float
    lost: list[tuple[Count, float]]
    energy_effective_rank: float | None = None
    energy_nats: float = 0.0
    measured_kl: dict[str, float] = {}

    def __post_init__(self) -> None:
        if any(one >= other for (one, _), (other, _) in pairwise(self.lost)):
            raise ValueError("the ranks of lost do not rise")
        for share in self.measured_kl:
            try:
                float(share)
            except ValueError:
                raise ValueError(f"measured_kl has {reading.shown(share)}, but its keys must be shares") from None


class _Spectra(msgspec.Struct):
    groups: list[_Group]
