"""`spectra.json` of a checkpoint (docs/format.md): what reports show of the spectra, written once by `compress`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.checkpoints import pretrained
from eckart.errors import CheckpointError
from eckart.support.not_finite import numbers, to_json

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
    data = numbers(pretrained.read_json(path, CheckpointError))
    groups = data.get("groups")
    if data.get("format") != FORMAT or data.get("version") != VERSION or not isinstance(groups, list):
        raise CheckpointError(
            f"{path}: format {data.get('format')!r} version {data.get('version')!r}, but this eckart reads "
            f"{FORMAT!r} version {VERSION}; delete the file, which only reports read, or take the eckart that wrote it."
        )
    return groups
