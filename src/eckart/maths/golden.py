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


def lowest_valley(low: int, high: int, value: Callable[[int], float], points: int = 8) -> int:
    """Golden section between the neighbours of the best of some evenly spread points; for several valleys."""
    spread = sorted({low + round(step * (high - low) / (points - 1)) for step in range(points)})
    best = min(range(len(spread)), key=lambda i: value(spread[i]))
    return golden_section(spread[max(best - 1, 0)], spread[min(best + 1, len(spread) - 1)], value)
