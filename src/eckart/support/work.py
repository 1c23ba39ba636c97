"""Finished work on disk, which survives a kill; only a run with the same key finds it again.

    DIR/<work>-<key>/<piece>.safetensors, <piece>.json     pieces: tensors and notes
    DIR/<work>-<key>.jsonl                                 a journal: many small results

The key is a hash of everything the work depends on, so that changed options start anew beside the old
work and two configurations never mix. A piece exists when its JSON does, which is renamed into place
last; a result when its line is whole. The folder may be deleted once the checkpoint is written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import OutputError
from eckart.support.files import output_error, write_text


class Key:
    """What a piece of work depends on: equal keys mean the same work.

    Made from the arguments of the call that does the work, by name: plain data, tensors (dtype, shape and every
    byte), models (all their parameters and buffers), lists and mappings of these. `work` names the kind of work.
    """

    def __init__(self, work: str, **depends: Any) -> None:
        self.work, self.depends = work, depends

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Plain data that JSON gives back unchanged, tensors and models as hashes."""
        facts: dict[str, Any] = json.loads(json.dumps(_plain(self.depends), sort_keys=True))
        return facts

    @cached_property
    def digest(self) -> str:
        """A hash of the facts, in hex."""
        return hashlib.blake2b(json.dumps(self.facts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def name(self) -> str:
        return f"{self.work}-{self.digest[:16]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _hash([("", value)])
    if isinstance(value, nn.Module):
        return _hash([*value.named_parameters(), *value.named_buffers()])
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a key: {value!r}")


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class WorkFolder:
    """The finished pieces of one stage of one run. Without a folder nothing is written or found."""

    def __init__(self, folder: str | Path | None, key: Key) -> None:
        self.folder = None if folder is None else Path(folder) / key.name

    def find(self, piece: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of a finished piece, or None. Raises `OutputError` if it cannot be read."""
        from safetensors.torch import load_file

        if self.folder is None or not (self.folder / f"{piece}.json").exists():
            return None
        try:
            notes = json.loads((self.folder / f"{piece}.json").read_text(encoding="utf-8"))
            tensors = load_file(self.folder / f"{piece}.safetensors") if notes["tensors"] else {}
        except Exception as error:  # safetensors has errors of its own
            raise OutputError(f"{self.folder}: {piece} cannot be read back ({error}); delete this folder.") from None
        return tensors, notes["notes"]

    def write(self, piece: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write a finished piece, whole or not at all."""
        from safetensors.torch import save_file

        if self.folder is None:
            return
        path = self.folder / f"{piece}.safetensors"
        partial = path.with_name(f".{path.name}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if tensors:
                save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
                os.replace(partial, path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise output_error(path, error) from None
        write_text(self.folder / f"{piece}.json", json.dumps({"tensors": len(tensors), "notes": dict(notes)}) + "\n")


class Journal:
    """Small results as JSON lines, each on the disk before the next is begun.

    `rows` holds what is there. The first line says what the rows depend on; a line that was cut off by
    a crash is dropped. Raises `OutputError` when the file cannot be written.
    """

    def __init__(self, folder: Path, key: Key) -> None:
        self.path = folder / f"{key.name}.jsonl"
        head = key.facts
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes() if self.path.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines[:1] != [head]:  # new, or cut off within its first line
                self.path.write_bytes((json.dumps(head) + "\n").encode())
            elif len(whole) < len(text):
                os.truncate(self.path, len(whole))
        except OSError as error:
            raise output_error(self.path, error) from None
        self.rows: list[dict[str, Any]] = lines[1:]

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        try:
            with self.path.open("ab") as file:
                file.write((json.dumps(row) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise output_error(self.path, error) from None
        self.rows.append(row)
