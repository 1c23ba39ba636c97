"""Locks on files. The system drops them when the process ends, however it ends, so the dead hold nothing.

A lock's file says who holds it, and is removed when the lock is released.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eckart.support.escaping import plain

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass
class Lock:
    """A lock that this process holds. `sure` is False where the file system knows no locks: then all hold it."""

    path: Path
    handle: int
    sure: bool

    def release(self) -> None:
        """Remove the file if it is still there, and let the next one have the lock; a second call does nothing."""
        if self.handle < 0:
            return
        handle, self.handle = self.handle, -1
        with contextlib.suppress(OSError):
            if _is_at(handle, self.path):
                self.path.unlink()
        os.close(handle)


def take(path: Path) -> Lock | None:
    """The lock on the file `path`, which is made; None if another holds it. Raises `OSError` if it cannot be made."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            sure = _flock(handle)
            if not sure:
                return Lock(path, handle, sure)
            if _is_at(handle, path):
                _sign(handle)
                return Lock(path, handle, sure)
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed the file after we had opened it: another one counts now


def wait(path: Path, say: Callable[[str], None] = lambda owner: None) -> Lock:
    """The lock on `path`, as soon as it is free; `say` is called once with the holder if that is not now."""
    lock = take(path)
    if lock is None:
        say(owner(path))
    pause = 0.005
    while lock is None:
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
        lock = take(path)
    return lock


def sweep(path: Path) -> None:
    """Remove a lock's file, or one that its writer has locked, if nobody holds it any more."""
    with contextlib.suppress(OSError):
        held = take(path)
        if held is not None and held.sure:
            held.release()


def owner(path: Path) -> str:
    """Who holds the lock, as in `pid 123 on host, since 2026-01-31 12:00`."""
    try:
        with path.open("rb") as file:
            text = file.read(200).decode("utf-8", "replace")
    except OSError:
        text = ""
    return plain(text) or "it does not say which"


def _sign(handle: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M")
    with contextlib.suppress(OSError):  # a full disk is told by those who write more
        os.ftruncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}, since {since}".encode())


def _flock(handle: int) -> bool:
    """Lock the file; False where there are no locks. Raises `BlockingIOError` when another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
