"""Is a checkpoint what was saved: its files against the hashes in `provenance.json`. Travels with checkpoints."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"


def of_file(path: Path) -> dict[str, Any]:
    """`{"bytes": size, "sha256": hex digest}`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_hashes(weights: Iterable[Any]) -> None:
    """Compare everything that was saved beside these weight files, and them, with the record in their folder.

    Raises `ValueError` that names the file; also for a folder without a record.
    """
    folders = {Path(path).parent for path in weights}
    if len(folders) != 1:
        raise ValueError("verify=True needs weight files in one folder.")
    folder = folders.pop()
    try:
        recorded = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / PROVENANCE}: records no files, so verify=True has nothing to go by.") from None
    for name, fingerprint in recorded.items():
        path = folder / name
        if path.is_file() and of_file(path) != fingerprint:
            raise ValueError(f"{path}: is not what was saved, by its size or hash in {PROVENANCE}.")
    if strange := sorted({Path(path).name for path in weights} - set(recorded)):
        raise ValueError(f"{folder / strange[0]}: is not recorded in {PROVENANCE}.")
