"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from eckart.errors import OutputError
from eckart.support import lock
from eckart.support.escaping import plain

LAST = ("provenance.json", "config.json")  # moved last into a folder that is there: without them it is no model
_NOT_TAKEN = ("lost+found",)  # what an empty disk holds


def resolved(path: str | Path) -> Path:
    """The absolute path behind `~` and links. Raises `OutputError` when there is none."""
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # working folder gone; no such user, a circle; a NUL in it
        raise output_error(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary name beside it; a link is followed, half a surrogate written out."""
    target = _ordinary(path)
    try:
        with partial_file(target) as partial:
            partial.write_bytes(text.encode("utf-8", "backslashreplace"))
            os.replace(partial, target)
    except OSError as error:
        raise output_error(path, error) from None


def check_file(path: Path) -> None:
    """Raise `OutputError` unless `write_text` can write there; nothing is left behind."""
    target = _ordinary(path)
    try:
        made = _make_folders(target.parent)
        try:
            with partial_file(target), contextlib.suppress(FileNotFoundError):
                os.stat(target)  # a name that is too long
        finally:
            _remove_folders(made)
    except OSError as error:
        raise output_error(path, error) from None


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written and renamed; removed if it is not. The dead ones of `path` are swept.

    It is locked by its writer, so that the living are told from the dead. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{_short(path.name)}"
    for dead in _partials(path.parent, stem):
        lock.sweep(dead)
    own = lock.wait(path.with_name(f"{stem}.partial-{secrets.token_hex(4)}"))
    try:
        yield own.path
    finally:
        own.release()


class OutputFolder:
    """A folder that appears whole or not at all, claimed before any work is done for it.

    Opening it makes the folder `partial`, so that whatever forbids to write at `path` is told now, as is another run
    that writes there. `finish` puts what is in `partial` in place; `close`, or leaving the context, removes it
    if it was not finished. A folder that is there, and empty, is kept: it may be a mount point or the working folder.
    `~` and links are followed. Raises `OutputError`.
    """

    def __init__(self, path: str | Path) -> None:
        self.given, self.path = Path(path), resolved(path)
        self.partial: Path | None = None
        self._lock: lock.Lock | None = None
        self._made: list[Path] = []
        try:
            self._open()
        except OSError as error:
            self.close()
            raise output_error(self.given, error) from None
        except BaseException:
            self.close()
            raise

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open(self) -> None:
        there = _is_empty_folder(self.given, self.path)
        self._made = [] if there else _make_folders(self.path.parent)
        home, stem = (self.path, ".eckart") if there else (self.path.parent, f".{_short(self.path.name)}")
        self._lock = lock.take(home / f"{stem}.lock")
        if self._lock is None:
            who = lock.owner(home / f"{stem}.lock")
            raise OutputError(f"{self.given}: another run writes it ({who}); name another folder, or wait for it.")
        if self._lock.sure:
            for dead in _partials(home, stem):
                shutil.rmtree(dead, ignore_errors=True)
        partial = home / f"{stem}.partial-{secrets.token_hex(4)}"
        partial.mkdir()
        self.partial = partial
        if not there:  # proves that the name is one
            self.path.mkdir()
            self.path.rmdir()

    def finish(self) -> None:
        """Put what was written in place. Raises `OSError`, or `OutputError` if a file of that name came there."""
        assert self.partial is not None, "finished or closed before"
        _follow_umask(self.partial)
        if os.path.lexists(self.path):
            self._move_in(self.partial)
        else:
            os.rename(self.partial, self.path)
        self._made = []
        self.close()

    def _move_in(self, partial: Path) -> None:
        """Rename the entries into the folder that is there, one by one; all of them or none."""
        entries = sorted(partial.iterdir(), key=lambda entry: (*(entry.name == name for name in LAST[::-1]), entry))
        for entry in entries:
            if os.path.lexists(self.path / entry.name):
                raise OutputError(f"{self.given}: while this ran, {entry.name} came there; nothing was written.")
        try:
            for entry in entries:
                os.rename(entry, self.path / entry.name)
        except BaseException:
            for entry in entries:
                if not os.path.lexists(entry):
                    os.rename(self.path / entry.name, entry)
            raise

    def close(self) -> None:
        """Remove what was not finished, and let others write there."""
        if self.partial is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial = None
        if self._lock is not None:
            self._lock.release()
        _remove_folders(self._made)


@contextmanager
def new_folder(path: str | Path | OutputFolder) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` on success and vanishes on any failure.

    `path` may have been claimed before, as an `OutputFolder`, which is finished or closed here.
    """
    with path if isinstance(path, OutputFolder) else OutputFolder(path) as output:
        assert output.partial is not None, "finished or closed before"
        try:
            yield output.partial
            output.finish()
        except OSError as error:
            raise output_error(output.given, error) from None


def check_new_folder(path: str | Path) -> None:
    """Raise `OutputError` unless a new folder can be written at `path`; nothing is left behind."""
    OutputFolder(path).close()


def free_space(path: str | Path | OutputFolder) -> int:
    """Bytes that are free on the disk under `path`. Raises `OutputError`."""
    target = resolved(os.fspath(path))
    try:
        existing = next(folder for folder in [target, *target.parents] if folder.exists())
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise output_error(target, error) from None


def check_space(path: str | Path | OutputFolder, needed: int) -> None:
    """Raise `OutputError` when the disk under `path` has fewer than `needed` bytes free."""
    if (free := free_space(path)) < needed:
        raise OutputError(
            f"{os.fspath(path)}: the checkpoint needs about {needed / 1e6:.1f} MB but the disk has "
            f"{free / 1e6:.1f} MB free; make room or name a folder elsewhere."
        )


def output_error(path: str | Path, error: Exception) -> OutputError:
    """One clear line for a failed write."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return OutputError(f"{path}: the disk is full; nothing was kept. Make room or name a folder elsewhere.")
    in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "a file is in the way" if in_the_way else getattr(error, "strerror", None) or plain(error).rstrip(".")
    return OutputError(f"{path}: cannot be written: {reason}; name another place.")


def _is_empty_folder(given: Path, path: Path) -> bool:
    """Whether `path` is a folder that is there; raises `OutputError` if it holds anything or is none."""
    if not os.path.lexists(path):
        return False
    if not path.is_dir():
        raise OutputError(f"{given}: is a file; name a folder that does not exist yet.")
    for name in os.listdir(path):
        if name not in _NOT_TAKEN and name != ".eckart.lock" and not name.startswith(".eckart.partial-"):
            raise OutputError(f"{given}: exists and is not empty; name another folder or empty this one.")
    return True


def _ordinary(path: Path) -> Path:
    """The path behind `path`; raises `OutputError` if a folder or a device has that name."""
    target = resolved(path)
    try:
        if target.exists() and not target.is_file():
            raise OutputError(f"{path}: is no ordinary file; name a file, which may be new.")
    except OSError as error:
        raise output_error(path, error) from None
    return target


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, from the top. None is left if one cannot be made."""
    made: list[Path] = []
    missing = [one for one in [folder, *folder.parents] if not one.exists()]
    try:
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            made.append(one)
    except BaseException:
        _remove_folders(made)
        raise
    return made


def _remove_folders(made: list[Path]) -> None:
    """Remove those of the folders that are still empty, from the bottom."""
    while made:
        with contextlib.suppress(OSError):
            made[-1].rmdir()
        made.pop()


def _partials(folder: Path, stem: str) -> list[Path]:
    """What has the partial names of `stem` in a folder; none if it may not be read."""
    name = re.compile(re.escape(stem) + r"\.partial-[0-9a-f]{8}")
    try:
        return [folder / entry for entry in os.listdir(folder) if name.fullmatch(entry)]
    except OSError:
        return []


def _short(name: str) -> str:
    """The name, or a hash in place of one that leaves no room for what a partial name adds."""
    return name if len(os.fsencode(name)) <= 200 else hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()


def _follow_umask(folder: Path) -> None:
    """Let whoever may read the folder read its files: safetensors makes its own for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
