"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eckart.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary name beside it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise output_error(path, error) from None


def check_new_folder(path: Path) -> None:
    """Raise `OutputError` unless `path` is free: absent, or an empty folder."""
    if path.is_file():
        raise OutputError(f"{path}: is a file; name a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"{path}: exists and is not empty; name another folder or empty this one.")


def check_space(path: Path, needed: int) -> None:
    """Raise `OutputError` when the disk under `path` has fewer than `needed` bytes free."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{path}: the checkpoint needs about {needed / 1e6:.1f} MB but the disk has "
            f"{free / 1e6:.1f} MB free; make room or name a folder elsewhere."
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` on success and vanishes on any failure."""
    check_new_folder(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _follow_umask(partial)
        if path.is_dir():
            path.rmdir()  # empty, as checked; os.replace cannot take its place on every system
        os.replace(partial, path)
    except OSError as error:
        raise output_error(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _follow_umask(folder: Path) -> None:
    """Let whoever may read the folder read its files: safetensors makes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def output_error(path: Path, error: Exception) -> OutputError:
    """One clear line for a failed write."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return OutputError(f"{path}: the disk is full; nothing was kept. Make room or name a folder elsewhere.")
    return OutputError(f"{path}: cannot be written: {error}.")
