"""Knapsack: one measured share for every group, so that the summed change of the output is smallest.

Driven by measured curves, where the other allocators here go by spectra alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import ClassVar, Literal, final

import torch

from eckart import ledger
from eckart.allocators._spectral_rest import spend_by_spectrum
from eckart.allocators.base import Allocator, checked, entry_at
from eckart.errors import BudgetError, OptionError
from eckart.maths.curve_fit import filled, never_rising
from eckart.types import Budget, Entry, Spectrum

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STATES = 400_000  # cells of the exact table beyond which costs are rounded up to a unit
PUBLISHED_UNITS = 10_000


@dataclass(frozen=True)
class Choice:
    """One option of one group: its rank (`None`: dense), its parameters, its change of the loss."""

    rank: int | None
    cost: int
    loss: float


@final
@dataclass(frozen=True)
class Knapsack(Allocator):
    """The model level of Duo-SVD (arXiv 2510.19385 v2, step 3a): multiple-choice knapsack by dynamic programming.

    `shares` are the candidate shares (1: dense) beside the target's own, those below `min_share` left
    out; each is measured on the first `windows` calibration windows, cut to `length` tokens.
    `measured` names fewer shares to measure; the curve through them (`eckart.maths.curve_fit`) gives the others.

    `budget` "exact": costs are exact parameters and the budget is never exceeded. What more parameters made worse by
    measurement is noise: curves are first made never to rise. The table's unit is
    the greatest common divisor of all costs where that gives at most 400,000 cells; the plan is then
    the optimum. Beyond, costs are rounded up to a unit and what that left over is spent on single
    steps up. What the curves see no use for goes where it lowers the discarded share of a group's energy most.
    "published": costs in 1/10,000 of the model, rounded *down*, and the reachable total
    nearest to the target, as in the release; the plan may then keep more than was asked, and the
    ledger says how much.
    """

    shares: tuple[float, ...] = SHARES
    measured: tuple[float, ...] = ()
    min_share: float = 0.1
    windows: int = 32
    length: int = 2048
    budget: Literal["exact", "published"] = "exact"
    wants: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def __post_init__(self) -> None:
        for name in ("shares", "measured"):
            try:
                values = tuple(float(share) for share in getattr(self, name))
            except ValueError:
                raise OptionError(f"knapsack.{name} is {getattr(self, name)!r}, but must be shares.") from None
            if not all(0 < share <= 1 for share in values):
                raise OptionError(f"knapsack.{name} is {values!r}, but shares lie in (0, 1].")
            object.__setattr__(self, name, values)
        if self.measured and (1.0 not in self.measured or len(set(self.measured)) < 2):
            raise OptionError(
                f"knapsack.measured is {self.measured!r}, but the curve for the other shares needs 1 and one more; "
                "name both, or none to measure all."
            )

    @property
    def may_exceed(self) -> bool:
        return self.budget == "published"

    @property
    def probed(self) -> tuple[float, ...]:
        return self.measured or self.shares

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        choices = [self._choices(spectrum, budget) for spectrum in spectra]
        groups = [spectrum.group for spectrum in spectra]
        total = sum(group.parameters for group in groups)
        if self.budget == "published":
            picked = published(choices, budget.keep * total, total)
        else:
            choices = [_without_noise(options) for options in choices]
            allowed = ledger.allowed_parameters(groups, budget.keep)
            ranks = [options[p].rank for options, p in zip(choices, exact(choices, allowed), strict=True)]
            return spend_by_spectrum(spectra, ranks, allowed, budget)
        return [entry_at(g, options[p].rank, budget) for g, options, p in zip(groups, choices, picked, strict=True)]

    def _choices(self, spectrum: Spectrum, budget: Budget) -> list[Choice]:
        """The options of one group by rising cost, none dearer than dense; the smallest rank is always one."""
        group, curve = spectrum.group, spectrum.observed.get("sensitivity")
        if curve is None:
            raise OptionError(
                f"{group.name}: the knapsack needs measured curves, and its spectrum has none; "
                "compress through a recipe, which measures them, or choose another allocator."
            )
        shares = [share for share in (*self.shares, budget.keep) if share >= self.min_share]
        losses = filled(curve, shares)
        if missing := [share for share in shares if share not in losses]:
            raise OptionError(
                f"{group.name}: the share {missing[0]:g} was not measured, and {sorted(curve)} are too few for a curve "
                "through them; name two shares beside 1 in knapsack.measured."
            )
        options: dict[int, Choice] = {}
        for share in sorted({*shares, min(shares)}):
            rank = ledger.rank_for(group, share, budget)
            cost = ledger.parameters(group, rank, ledger.admitted(group, budget.storage))
            if cost <= group.parameters:
                options.setdefault(cost, Choice(rank, cost, losses[share]))
        return [options[cost] for cost in sorted(options)]


def _without_noise(options: Sequence[Choice]) -> list[Choice]:
    """The options of one group, by rising cost, with losses that never rise."""
    losses = never_rising([option.loss for option in options])
    return [replace(option, loss=loss) for option, loss in zip(options, losses, strict=True)]


def exact(choices: Sequence[Sequence[Choice]], allowed: int) -> list[int]:
    """Index of the option of each group; the summed cost is at most `allowed` and the summed loss least.

    Raises `BudgetError` when even the cheapest options do not fit.
    """
    cheapest = sum(options[0].cost for options in choices)
    if cheapest > allowed:
        raise BudgetError(
            f"the cheapest candidates need {cheapest} parameters, but the budget allows {allowed}; "
            "ask for more, or lower knapsack.min_share and add smaller knapsack.shares."
        )
    # Only what an option costs beyond its group's cheapest is at stake: those fit by themselves.
    extra = [[option.cost - options[0].cost for option in options] for options in choices]
    unit = gcd(*(cost for costs in extra for cost in costs)) or 1
    unit = max(unit, -(-(allowed - cheapest) // STATES))
    cells = (allowed - cheapest) // unit
    picked = _table([[-(-cost // unit) for cost in costs] for costs in extra], choices, cells, at_most=True)
    return _spend(picked, choices, allowed)


def published(choices: Sequence[Sequence[Choice]], target: float, total: int) -> list[int]:
    """The released table: floored costs, and the reachable cell nearest to the target, above it or below."""
    unit = total // PUBLISHED_UNITS + 1
    costs = [[option.cost // unit for option in options] for options in choices]
    return _table(costs, choices, int(target / unit), at_most=False)


def _table(costs: list[list[int]], choices: Sequence[Sequence[Choice]], cells: int, at_most: bool) -> list[int]:
    """Dynamic programming over the summed cost in cells; one index for each group.

    `at_most`: the best of all cells up to `cells`; otherwise the reachable cell nearest to it.
    """
    size = (cells if at_most else sum(max(row) for row in costs)) + 1
    best = torch.full((size,), torch.inf, dtype=torch.float64)
    best[0] = 0
    picks: list[torch.Tensor] = []
    for row, options in zip(costs, choices, strict=True):
        new = torch.full_like(best, torch.inf)
        pick = torch.zeros(size, dtype=torch.uint8)
        for number, (cost, option) in enumerate(zip(row, options, strict=True)):
            if cost >= size:
                continue
            value = best[: size - cost] + option.loss
            better = value < new[cost:]
            new[cost:][better] = value[better]
            pick[cost:][better] = number
        best = new
        picks.append(pick)
    if at_most:
        cell = int(best.argmin())
    else:
        reachable = torch.isfinite(best).nonzero()[:, 0]
        cell = int(reachable[(reachable - cells).abs().argmin()])
    picked = []
    for row, pick in zip(reversed(costs), reversed(picks), strict=True):
        picked.append(int(pick[cell]))
        cell -= row[picked[-1]]
    return picked[::-1]


def _spend(picked: list[int], choices: Sequence[Sequence[Choice]], allowed: int) -> list[int]:
    """Single steps to a dearer and better option while one fits, the largest gain first."""
    picked = list(picked)
    left = allowed - sum(options[p].cost for options, p in zip(choices, picked, strict=True))
    while True:
        steps = [
            (options[p].loss - other.loss, g, number)
            for g, (options, p) in enumerate(zip(choices, picked, strict=True))
            for number, other in enumerate(options)
            if other.cost - options[p].cost <= left and other.loss < options[p].loss
        ]
        if not steps:
            return picked
        _, group, number = max(steps)
        left -= choices[group][number].cost - choices[group][picked[group]].cost
        picked[group] = number
