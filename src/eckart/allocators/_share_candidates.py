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
    kinds = [ledger.admitted(group, budget.storage) for group in groups]
    wishes = [_wish(g, keep * g.parameters, kind) for g, keep, kind in zip(groups, keeps, kinds, strict=True)]

    def cost(i: int, rank: int) -> int:
        return ledger.parameters(groups[i], rank, kinds[i])

    least = [min(multiple, group.full_rank) for group in groups]
    highest = [_highest(group, kind) for group, kind in zip(groups, kinds, strict=True)]
    most = [rank // multiple * multiple or rank for rank in highest]
    ranks = [
        min(max(floor(wish) // multiple * multiple, low), high)
        for wish, low, high in zip(wishes, least, most, strict=True)
    ]
    room = allowed - sum(cost(i, rank) for i, rank in enumerate(ranks))
    while room < 0:
        at = max((i for i, r in enumerate(ranks) if r > least[i]), key=lambda i: (ranks[i] - wishes[i]) / wishes[i])
        lower = ranks[at] - min(multiple, ranks[at] - least[at])
        room += cost(at, ranks[at]) - cost(at, lower)
        ranks[at] = lower
    while affordable := [
        i for i, r in enumerate(ranks) if r + multiple <= most[i] and cost(i, r + multiple) - cost(i, r) <= room
    ]:
        at = max(affordable, key=lambda i: (wishes[i] - ranks[i]) / wishes[i])
        room -= cost(at, ranks[at] + multiple) - cost(at, ranks[at])
        ranks[at] += multiple
    return ranks


def _highest(group: Group, storage: str) -> int:
    """The largest rank that the storage is for."""
    full = group.full_rank
    return full - 1 if full > 1 and ledger.refusal(group, full, storage) else full


def _wish(group: Group, allowance: float, storage: str) -> float:
    """The rank, between whole ones, that costs `allowance` parameters."""
    below = ledger.largest_rank(group, Fraction(allowance), storage)
    here, above = (ledger.parameters(group, rank, storage) for rank in (below, below + 1))
    return below + (allowance - here) / max(above - here, 1)


def draws(count: int, units: int, kappa_most: float, noise: float, seed: int) -> list[tuple[float, list[float]]]:
    """`count` pairs of a kappa from U(0, kappa_most) and a log-normal factor for each unit."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        kappa = float(torch.rand((), generator=generator, dtype=torch.float64)) * kappa_most
        factors = (torch.randn(units, generator=generator, dtype=torch.float64) * noise).exp()
        pairs.append((kappa, factors.tolist()))
    return pairs


def mean_removed(groups: Sequence[Group], keep: float) -> float:
    """The share of the groups' parameters that goes, from the whole number that may stay."""
    total = sum(group.parameters for group in groups)
    return float(1 - Fraction(ledger.allowed_parameters(groups, keep), total))
