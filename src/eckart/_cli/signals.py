"""Ctrl-C, SIGTERM and SIGHUP end a command alike: what it began is undone on the way out."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not on every system


class Stopped(KeyboardInterrupt):
    """A signal came. Who catches it may raise another in its place: `stoppable` knows which signal it was."""


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Raise `Stopped` in the main thread when a signal comes; what is ignored (under nohup) stays so.

    Another Ctrl-C ends the process at once, and so does another signal that is not of the same moment: a terminal
    that closes may send its own twice. Gives the list of the signals that came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield came
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    first = 0.0

    def stop(number: int, frame: FrameType | None) -> Any:
        nonlocal first
        came.append(number)
        if len(came) == 1:
            first = time.monotonic()
            raise Stopped(signal.Signals(number).name)
        if number == signal.SIGINT or time.monotonic() - first > 1:
            os._exit(128 + number)

    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
