"""Progress as the library sees it: named stages that count. Silent unless somebody listens.

The command line listens with rich bars (`eckart._cli`); a notebook or a server may pass its own.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


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
