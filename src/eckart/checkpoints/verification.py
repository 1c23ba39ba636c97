"""`eckart verify`: is a checkpoint still what was saved, and do its parts fit one another?"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.checkpoints import checkpoint, fingerprints
from eckart.checkpoints.fingerprints import FileState
from eckart.errors import CheckpointError
from eckart.portable.hashes import PROVENANCE


@dataclass(frozen=True)
class Verification:
    """What was found: every file and how it is now beside how it was saved; `whole` if none has changed or is gone."""

    folder: str
    files: tuple[FileState, ...]
    accepted: bool = False

    @property
    def whole(self) -> bool:
        return all(file.state in ("as saved", "not recorded") for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        files = {file.file: file.state for file in self.files}
        return {"folder": self.folder, "whole": self.whole, "accepted": self.accepted, "files": files}


def verify(folder: str | Path, *, accept: bool = False) -> Verification:
    """Compare every file of a checkpoint with the sizes and hashes in its provenance; reads all of them once.

    Before that its parts are compared: plan with configuration, configuration with the heads of the weight files.
    `accept` records the files as they are, for a checkpoint that was trained or edited on purpose; what they were is
    kept in the provenance. Raises `CheckpointError` for a folder that is no checkpoint, for parts that contradict one
    another, which cannot be accepted, and for one without a record.
    """
    folder = Path(os.path.expanduser(folder))
    _, weights = checkpoint.parts(folder)
    checkpoint.check_structure(folder, weights)
    provenance = checkpoint.read_provenance(folder)
    recorded = provenance.get("files")
    if recorded is None and not accept:
        raise CheckpointError(f"{folder}: {PROVENANCE} records no files; eckart verify {folder} --accept records them.")
    states = tuple(fingerprints.compare(folder, recorded or {}))
    if not accept:
        return Verification(str(folder), states)
    changed = {state.file: (recorded or {}).get(state.file) for state in states if state.state != "as saved"}
    provenance["files"] = fingerprints.of_folder(folder)
    if changed:
        provenance["accepted"] = [*provenance.get("accepted", []), changed]
    checkpoint.write_json(folder / PROVENANCE, provenance)
    return Verification(str(folder), tuple(FileState(state.file, "as saved") for state in states), accepted=True)
