"""Sizes and hashes of the files of a checkpoint, which `provenance.json` keeps: is it what was saved?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eckart.errors import CheckpointError
from eckart.portable.hashes import PROVENANCE, of_file

CARD = "README.md"  # people edit it
State = Literal["as saved", "changed", "missing", "not recorded"]


@dataclass(frozen=True)
class FileState:
    """One file of a checkpoint, by its path inside, and how it is now beside how it was saved."""

    file: str
    state: State


def of_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint but the card and the provenance, by its path inside."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: of_file(path) for name, path in names.items() if _recorded(name)}


def compare(folder: Path, recorded: Mapping[str, Any]) -> list[FileState]:
    """Every file that is there or was recorded. Weight files must be recorded; what was added beside them is free."""
    rows = []
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted({*there, *recorded}):
        if not _recorded(name):
            continue
        state: State = "missing"
        if name not in recorded:
            state = "not recorded"
        elif name in there:
            # The size first: a file that was cut off need not be read to know.
            same = (folder / name).stat().st_size == recorded[name].get("bytes")
            same = same and of_file(folder / name)["sha256"] == recorded[name].get("sha256")
            state = "as saved" if same else "changed"
        rows.append(FileState(name, state))
    return rows


def check(folder: Path, recorded: Mapping[str, Any], weights: Sequence[Path]) -> None:
    """Raise `CheckpointError` for a file that is not what was saved, and for weight files that were not saved.

    A file that is gone is told where a model cannot be read without it, and only there.
    """
    names = {path.name for path in weights}
    saved = {name for name in recorded if name.endswith(".safetensors") and "/" not in name}
    if saved != names:
        raise CheckpointError(f"{folder}: its weight files are not those that {PROVENANCE} names: {sorted(saved)}.")
    _refuse_changed(folder, compare(folder, recorded))


def check_shown(folder: Path, recorded: Mapping[str, Any]) -> None:
    """The same for what a report shows: configuration, plan, spectra. Reads no weights."""
    shown = {name: recorded[name] for name in ("config.json", "plan.json", "spectra.json") if name in recorded}
    _refuse_changed(folder, [row for row in compare(folder, shown) if row.file in shown])


def check_tokenizer(folder: Path, recorded: Mapping[str, Any]) -> None:
    """The same for the files of the tokenizer, which are read before the model."""
    shown = {name: recorded[name] for name in recorded if name.startswith(("tokenizer", "special_tokens", "chat_"))}
    _refuse_changed(folder, [row for row in compare(folder, shown) if row.file in shown])


def _refuse_changed(folder: Path, rows: Sequence[FileState]) -> None:
    for row in rows:
        if row.state == "changed":
            raise CheckpointError(
                f"{folder / row.file}: is not what was saved, by its size or hash in {PROVENANCE}; copy or download it "
                f"again. If you trained or edited it on purpose: eckart verify {folder} --accept"
            )


def _recorded(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
    return name not in (CARD, PROVENANCE) and not hidden
