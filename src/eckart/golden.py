"""Golden-section search for the smallest value of a function of a whole number."""

from collections.abc import Callable

GOLDEN = 0.618


def golden_section(low: int, high: int, value: Callable[[int], float]) -> int:
    """Narrow `[low, high]` until it holds fewer than four points, then take the best of those.

    Finds the minimum of a function that first falls and then rises. `value` should remember what it
    was asked: points are asked again. About `1.44 log2(high - low)` different ones.
    """
    while high - low >= 3:
        left, right = low + round((1 - GOLDEN) * (high - low)), low + round(GOLDEN * (high - low))
        if left >= right:
            left, right = right, left + 1
        if value(left) <= value(right):
            high = right
        else:
            low = left
    return min(range(low, high + 1), key=value)
