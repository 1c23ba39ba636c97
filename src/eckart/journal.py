"""A journal of results that cost time: JSON lines, each on the disk before the next is begun.

The file is named after a hash of everything the results depend on, so that an interrupted run finds
its own journal again and a run with any other option starts a new one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.files import output_error


def key_of(depends: Mapping[str, Any]) -> str:
    """Hash of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Hash of every parameter's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


class Journal:
    """Rows under one key. `rows` holds what is there; `add` appends one, flushed to the disk.

    The first line says what the rows depend on. A line that was cut off by a crash is dropped.
    """

    def __init__(self, folder: Path, name: str, depends: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}-{key_of(depends)[:16]}.jsonl"
        self.rows: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(json.loads(json.dumps(depends)))
        except OSError as error:
            raise output_error(self.path, error) from None

    def _open(self, depends: Any) -> None:
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines or lines[0] != depends:  # new, or cut off within its first line
            whole, lines = (json.dumps(depends) + "\n").encode(), [depends]
            self.path.write_bytes(whole)
        elif len(whole) < len(text):
            os.truncate(self.path, len(whole))
        self.rows = lines[1:]

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; raises `OutputError` when it cannot be written."""
        try:
            with self.path.open("ab") as file:
                file.write((json.dumps(row) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise output_error(self.path, error) from None
        self.rows.append(row)
