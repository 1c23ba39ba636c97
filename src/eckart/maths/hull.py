"""One water level over many (cost, loss) curves: the continuous knapsack with free disposal, solved exactly.

For a multiplier lambda each curve minimises `loss + lambda * cost` on its own, which can only ever
choose a vertex of the curve's lower convex hull. So the vertices of all curves, sorted by what one
unit of cost saves there, are the solutions for every budget: a budget is a place in that list.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """The choices for one group that are worth considering: costs rise, losses fall, both strictly.

    `label[i]` is the caller's name for choice i.
    """

    costs: Integers
    losses: Floats
    label: Integers

    @staticmethod
    def of(costs: Integers, losses: Floats, label: Integers) -> "Curve":
        """Sort the choices by cost and drop those that a cheaper one beats."""
        order = np.lexsort((losses, costs))
        costs, losses, label = costs[order], losses[order], label[order]
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])
        better = losses < best_before
        return Curve(costs[better], losses[better], label[better])

    def hull(self) -> Integers:
        """Indices of the vertices of the lower convex hull, from the cheapest to the best."""
        slopes = np.diff(self.losses) / np.diff(self.costs)
        if bool((np.diff(slopes) > 0).all()):
            return np.arange(len(self.costs))
        kept: list[int] = []
        for i in range(len(self.costs)):
            while len(kept) > 1 and self._slope(kept[-2], kept[-1]) >= self._slope(kept[-1], i):
                kept.pop()
            kept.append(i)
        return np.array(kept, dtype=np.int64)

    def _slope(self, i: int, j: int) -> float:
        return float((self.losses[j] - self.losses[i]) / (self.costs[j] - self.costs[i]))


def spend(curves: Sequence[Curve], allowance: int) -> list[int] | None:
    """The choice for each curve, as its index; costs add up to at most `allowance`. None: not even the cheapest fit.

    The choices on the water level are the optimum for the cost that they have. What is left over
    after them goes, step by step, to the choice (on the hull or not) that lowers the loss most.
    """
    hulls = [curve.hull() for curve in curves]
    chosen = [int(hull[0]) for hull in hulls]
    left = allowance - sum(int(curve.costs[i]) for curve, i in zip(curves, chosen, strict=True))
    if left < 0:
        return None
    prices, steps, owners = [], [], []
    for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True)):
        step = np.diff(curve.costs[hull])
        saving = -np.diff(curve.losses[hull]) / step
        prices.append(np.minimum.accumulate(saving) if len(saving) else saving)  # falls, save for rounding
        steps.append(step)
        owners.append(np.full(len(step), number))
    order = np.argsort(-np.concatenate(prices), kind="stable")
    spent = np.concatenate(steps)[order].cumsum()
    level = int(np.searchsorted(spent, left, side="right"))  # the water level
    for number, count in enumerate(np.bincount(np.concatenate(owners)[order][:level], minlength=len(curves))):
        chosen[number] = int(hulls[number][count])
    left -= int(spent[level - 1]) if level else 0
    _spend_rest(curves, chosen, left)
    return chosen


def _spend_rest(curves: Sequence[Curve], chosen: list[int], left: int) -> None:
    """Move `chosen`, in place, along single curves while that lowers the loss and fits in `left`."""
    while left > 0:
        best, to, gain = -1, -1, 0.0
        for number, curve in enumerate(curves):
            here = chosen[number]
            there = int(np.searchsorted(curve.costs, curve.costs[here] + left, side="right")) - 1
            if curve.losses[here] - curve.losses[there] > gain:
                best, to, gain = number, there, float(curve.losses[here] - curve.losses[there])
        if best < 0:
            return
        left -= int(curves[best].costs[to] - curves[best].costs[chosen[best]])
        chosen[best] = to
