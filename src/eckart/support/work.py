"""Finished work on disk, which survives a kill; only a run with the same key finds it again.

    DIR/<work>-<key>/<piece>.safetensors, <piece>.json     pieces: tensors and notes
    DIR/<work>-<key>.jsonl                                 a journal: many small results

The key is a hash of everything the work depends on, so that changed options start anew beside the old
work and two configurations never mix. A piece exists when its JSON does, which is renamed into place
last; a result when its line is whole. Both have checksums, and what is damaged is made again. One run at a time
holds a folder (`opened`). The folder may be deleted once the checkpoint is written.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import OutputError
from eckart.support import lock
from eckart.support.cache import cache_folder
from eckart.support.files import OutputFolder, output_error, partial_file, resolved, write_text

log = logging.getLogger(__name__)

SCRATCH = "decompositions-"  # begins the names of folders that only their own run needs


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
        self.folder = None if folder is None else resolved(folder) / key.name
        self.key = key

    def find(self, piece: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of a finished piece; None, with a warning, if it is no longer what was written."""
        from safetensors.torch import load_file

        if self.folder is None or not (self.folder / f"{piece}.json").exists():
            return None
        path = self.folder / f"{piece}.safetensors"
        try:
            record = _unseal((self.folder / f"{piece}.json").read_bytes(), self.key, piece)
            if record is None or (record["tensors"] and _file_hash(path) != record["tensors"]):
                raise ValueError("its checksum is another")
            return (load_file(path) if record["tensors"] else {}), record["notes"]
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s: piece %s is damaged (%s) and is made again", self.folder, piece, error)
            return None

    def write(self, piece: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write a finished piece, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self.folder is None:
            return
        path, digest = self.folder / f"{piece}.safetensors", None
        try:
            if tensors:
                with partial_file(path) as partial:
                    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial)
                    digest = _file_hash(partial)
                    os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise output_error(path, error) from None
        record = {"tensors": digest, "notes": dict(notes)}
        write_text(self.folder / f"{piece}.json", _seal(record, self.key, piece) + "\n")


class Journal:
    """Small results as JSON lines, each on the disk before the next is begun.

    `rows` holds what is there. The first line says what the rows depend on. Each line has a checksum; a damaged one
    is dropped with a warning, and one that was cut off by a crash without. Journals of version 0.1 have no
    checksums: their rows are taken as they are if the first line is right. Several processes may write.

    Raises `OutputError` when the file cannot be written; in the user's cache, which nobody asked for, that is a
    warning, and rows are kept in memory alone.
    """

    def __init__(self, folder: Path, key: Key) -> None:
        self.path, self.key = resolved(folder) / f"{key.name}.jsonl", key
        self.rows: list[dict[str, Any]] = []
        self._kept = True
        with self._written():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self.rows = self._read()

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.rows.append(row)
        if self._kept:
            with self._written(), self._locked(), self.path.open("ab") as file:
                file.write(f"{_seal(row, self.key)}\n".encode())
                file.flush()
                os.fsync(file.fileno())

    def _read(self) -> list[dict[str, Any]]:
        """The rows of the file, which is written anew if it is not in order."""
        *lines, torn = (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")
        sealed = lines[:1] == [_seal(self.key.facts, self.key).encode()]
        old = bool(lines) and not sealed and _parsed(lines[0]) == self.key.facts
        found = [(line, _unseal(line, self.key) or (_parsed(line) if old else None)) for line in lines[1:]]
        whole = [(line, row) for line, row in found if row is not None and "checksum" not in row]
        damaged = len(lines) - len(whole) - (sealed or old)
        if damaged:
            log.warning("%s: %d damaged lines are dropped, and measured again", self.path, damaged)
        if damaged or torn or not lines:
            head = lines[0] if old else _seal(self.key.facts, self.key).encode()
            with partial_file(self.path) as partial:
                partial.write_bytes(b"".join(line + b"\n" for line in [head, *(line for line, _ in whole)]))
                os.replace(partial, self.path)
        return [row for _, row in whole]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        held = lock.wait(self.path.with_name(f".{self.path.name}.lock"))
        try:
            yield
        finally:
            held.release()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.path.is_relative_to(resolved(cache_folder())):
                raise output_error(self.path, error) from None
            self._kept = False
            log.warning("%s: the cache cannot be written (%s); going on without it", self.path, error.strerror)


@contextmanager
def opened(folder: str | Path | None, out: str | Path | OutputFolder | None = None) -> Iterator[Path | None]:
    """Hold a work folder for one run and give a folder in it for what this run alone needs; None without one.

    Another run with the same folder waits until this one ends, and says so. What dead runs left half done is
    removed. Raises `OutputError` at once when the folder cannot be written, or lies in `out`, the output.
    """
    if folder is None:
        yield None
        return
    work = resolved(folder)
    if out is not None and work.is_relative_to(resolved(os.fspath(out))):
        raise OutputError(f"{folder}: the work folder lies in the output folder; name one elsewhere.")
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            stack.callback(_hold(work, folder).release)
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=SCRATCH, dir=work, ignore_cleanup_errors=True)
            )
        except OSError as error:
            raise output_error(folder, error) from None
        yield Path(scratch)


def _hold(work: Path, name: str | Path) -> lock.Lock:
    """The lock of a work folder, as soon as it is free, and the folder swept."""
    held = lock.wait(
        work / ".lock", lambda owner: log.warning("%s: in use by another run (%s); waiting for it", name, owner)
    )
    if held.sure:
        _sweep(work)
    return held


def _sweep(work: Path) -> None:
    """Remove what runs that were killed left half done."""
    for path in work.glob(f"{SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in [*work.glob(".*.jsonl.lock"), *work.glob(".*.partial-*"), *work.glob("*/.*.partial-*")]:
        lock.sweep(path)


def _seal(data: Mapping[str, Any], key: Key, piece: str = "") -> str:
    """The data as JSON, with a checksum that holds for this key and piece alone."""
    return json.dumps({**data, "checksum": _checksum(data, key, piece)})


def _unseal(line: bytes, key: Key, piece: str = "") -> dict[str, Any] | None:
    """What `_seal` was given; None if it is not that any more."""
    data = _parsed(line)
    if data is None or data.pop("checksum", None) != _checksum(data, key, piece):
        return None
    return data


def _checksum(data: Mapping[str, Any], key: Key, piece: str) -> str:
    text = json.dumps([key.digest, piece, data])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
