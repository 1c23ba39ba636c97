"""Memory that is free goes back to the system.

glibc keeps what large temporaries leave between tensors that stay, in pieces that the next ones do not fit: after
thirty blocks that was as much again as all decompositions. (To map every large tensor by itself would avoid it, too,
and cost half of the speed.) With another C library nothing is done.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def _trim() -> Callable[[int], Any] | None:
    try:
        trim: Callable[[int], Any] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


def give_back() -> None:
    """Return free memory of the heap to the system, which takes milliseconds."""
    if (trim := _trim()) is not None:
        trim(0)
