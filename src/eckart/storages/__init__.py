"""Storages: how a factorised layer keeps its matrix. One file per storage, found by file name.

These files travel with checkpoints, flat in one folder: they import torch and one another, and nothing else.
"""

import importlib
from functools import cache
from pathlib import Path

from eckart.storages.base import FactorizedLayer, Pair, Size, Storage

__all__ = ["FactorizedLayer", "Pair", "Size", "Storage", "find", "known", "names"]


@cache
def names() -> tuple[str, ...]:
    """The names of all storages, sorted; imports none of them."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(f.stem for f in files if f.stem != "base" and not f.stem.startswith("_")))


def find(name: object) -> Storage:
    """The storage of a name. Raises `ValueError` for one that this eckart does not know."""
    if not isinstance(name, str) or name not in names():
        raise ValueError(f"storage is {name!r}, which this eckart does not know; install a newer one.")
    return _made(name)


@cache
def _made(name: str) -> Storage:
    module = importlib.import_module(f"eckart.storages.{name}")
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    (storage,) = [v for v in classes if issubclass(v, Storage)]
    return storage()


def known() -> list[Storage]:
    """All storages."""
    return [find(name) for name in names()]
