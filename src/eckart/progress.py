"""Progress as the library sees it: named stages that count. Silent unless somebody listens.

The command line listens with rich bars (`eckart._cli`); a notebook or a server may pass its own.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
log = logging.getLogger("eckart.run")


class Progress(Protocol):
    """Called as work advances: `stage` names what runs, `done` of `total` steps are finished."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """The default listener: none."""


def track(items: Iterable[T], stage: str, total: int, progress: Progress) -> Iterator[T]:
    """Yield the items and report each one when the caller comes back for the next."""
    progress(stage, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(stage, done, total)


class Stages:
    """The stages of a run: announced to whoever listens, timed. `seconds` is the wall time of each, added up."""

    def __init__(self, progress: Progress = silent) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, *, counts: bool = False) -> Iterator[None]:
        """Time what runs inside. Most stages count steps of their own; with `counts` this is one step of one."""
        start = time.perf_counter()
        if counts:
            self.progress(stage, 0, 1)
        yield
        if counts:
            self.progress(stage, 1, 1)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        log.info("%s: %.1f s", stage, self.seconds[stage])
