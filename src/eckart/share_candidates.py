"""Pure data: how much to remove from each unit, drawn from a prior, and made into ranks within the exact budget.

A unit is what shares one share: a block, or one kind of matrix in a block. Nothing is measured here.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import exp, floor, log

import torch

from eckart import ledger
from eckart.types import Budget, Group

NARROW = (0.25, 1.75)  # what a unit may lose, in units of the mean: a guard against collapse
MOST = 0.95  # no unit loses more than this, however small the budget


def draw_removal(
    sensitivities: Sequence[float],
    parameters: Sequence[int],
    mean: float,
    kappa: float,
    noise: Sequence[float],
) -> list[float]:
    """Share removed from each unit, `rho ~ (P / s)^kappa * noise`, clipped and scaled to the parameters' `mean`.

    If damage grows like `s (rho / rho_0)^p`, the least total damage at fixed parameters is at
    `rho ~ (P / s)^(1 / (p - 1))`, so kappa in [0.3, 1] stands for p from 4 to 2, and 0 is uniform.
    """
    wishes = [
        exp(kappa * (log(count) - log(sensitivity))) * factor
        for sensitivity, count, factor in zip(sensitivities, parameters, noise, strict=True)
    ]
    return scaled_to_mean(wishes, parameters, mean)


def scaled_to_mean(wishes: Sequence[float], parameters: Sequence[int], mean: float) -> list[float]:
    """`clip(c * wishes)` within `NARROW` of `mean`, with c such that the weighted mean is `mean`."""
    low, high = NARROW[0] * mean, min(NARROW[1] * mean, max(MOST, mean))
    total = sum(parameters)

    def clipped(scale: float) -> list[float]:
        return [min(max(scale * wish, low), high) for wish in wishes]

    bottom, top = 0.0, 2 * high / min(wishes)
    for _ in range(200):  # the weighted mean grows with the scale
        middle = (bottom + top) / 2
        reached = sum(rho * count for rho, count in zip(clipped(middle), parameters, strict=True)) / total
        bottom, top = (middle, top) if reached < mean else (bottom, middle)
    return clipped((bottom + top) / 2)


def fit_ranks(groups: Sequence[Group], keeps: Sequence[float], budget: Budget) -> list[int]:
    """Ranks near the share `keeps[i]` of each group, never over the budget and within one step of it.

    Steps are of `budget.rank_multiple`. The group furthest below its wish gets the next step; a budget
    that the smallest ranks have overspent is repaired from the group furthest above.
    """
    multiple, allowed = budget.rank_multiple, ledger.allowed_parameters(groups, budget.keep)
    costs = [ledger.parameters(group, 1) for group in groups]
    wishes = [keep * group.parameters / cost for keep, group, cost in zip(keeps, groups, costs, strict=True)]
    least = [min(multiple, group.full_rank) for group in groups]
    most = [group.full_rank // multiple * multiple or group.full_rank for group in groups]
    ranks = [
        min(max(floor(wish) // multiple * multiple, low), high)
        for wish, low, high in zip(wishes, least, most, strict=True)
    ]
    room = allowed - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    while room < 0:
        at = max((i for i, r in enumerate(ranks) if r > least[i]), key=lambda i: (ranks[i] - wishes[i]) / wishes[i])
        step = min(multiple, ranks[at] - least[at])
        ranks[at] -= step
        room += step * costs[at]
    while able := [i for i, r in enumerate(ranks) if r + multiple <= most[i] and multiple * costs[i] <= room]:
        at = max(able, key=lambda i: (wishes[i] - ranks[i]) / wishes[i])
        ranks[at] += multiple
        room -= multiple * costs[at]
    return ranks


def draws(count: int, units: int, kappa_most: float, noise: float, seed: int) -> list[tuple[float, list[float]]]:
    """`count` pairs of a kappa from U(0, kappa_most) and a log-normal factor for each unit."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        kappa = float(torch.rand((), generator=generator, dtype=torch.float64)) * kappa_most
        factors = (torch.randn(units, generator=generator, dtype=torch.float64) * noise).exp()
        drawn.append((kappa, factors.tolist()))
    return drawn


def mean_removed(groups: Sequence[Group], keep: float) -> float:
    """The share of the groups' parameters that goes, from the whole number that may stay."""
    total = sum(group.parameters for group in groups)
    return float(1 - Fraction(ledger.allowed_parameters(groups, keep), total))
