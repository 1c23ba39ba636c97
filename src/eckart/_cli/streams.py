"""Standard output and error, which may be closed, full, or unable to say é: no reason to lose hours of work."""

import contextlib
import errno
import io
import os
import sys
from typing import Any, Literal


class Stream:
    """`sys.stdout` or `sys.stderr` as it is now. What cannot be written is dropped, and `error` says why."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self.name = name
        self.error: Exception | None = None

    @property
    def _stream(self) -> Any:
        stream = getattr(sys, self.name)  # None when it was closed from the start
        return getattr(stream, "rich_proxied_file", stream)  # behind what rich puts there under a progress bar

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return bool(self._stream is not None and self._stream.isatty())

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return int(self._stream.fileno())

    def write(self, text: str) -> int:
        if self._stream is not None and self.error is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: closed by someone here
                self.error = error
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def open(self) -> None:
        """Begin anew; letters that the encoding has not are written as escapes."""
        self.error = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def close(self) -> None:
        """Flush; what a broken stream still holds goes nowhere, or Python would complain at the very end."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)


stdout, stderr = Stream("stdout"), Stream("stderr")


def close(code: int) -> int:
    """Flush both, and say the exit code: that of a command whose reader went away is 141, as for other programs."""
    stdout.close()
    if stdout.error is not None and getattr(stdout.error, "errno", None) != errno.EPIPE:
        stderr.write(f"eckart: standard output: {getattr(stdout.error, 'strerror', None) or stdout.error}.\n")
    stderr.close()
    if stdout.error is None or code:
        return code
    return 141 if getattr(stdout.error, "errno", None) == errno.EPIPE else 1
