"""Water level: every group is cut where one more parameter saves equally much loss, over the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, final

import numpy as np

from eckart import ledger
from eckart.allocators.base import Allocator, checked, entry_at
from eckart.errors import BudgetError, OptionError
from eckart.maths.hull import Curve, spend
from eckart.types import Budget, Entry, Group, Level, Spectrum

DENSE = 0  # the label of the choice to leave a group dense
RANK_STEP = 16  # of cuts that stand beside forms of few bits, which beat nearly all of them


@final
@dataclass(frozen=True)
class WaterLevel(Allocator):
    """Minimises the summed loss under the budget, over the lower hull of each group's (cost, loss) curve.

    The loss is the predicted one in nats per token where every spectrum knows it, else the squared truncation error.
    `normalise` divides each group's loss by what rank 0 would lose, for metrics whose groups do not speak one unit.
    The budget's storage prices the ranks; `dense` allows a group to stay whole. No rank is below `floor_rank` or
    below `floor_share` of the full rank: where costs are concave (pivoted), equal spectra would end as dense ones and
    ones of rank 1, which an additive loss likes and a real model does not. `correction` measures by how much the
    predicted losses of the kinds of matrices are off, and allocates again (`eckart.planning.correction`). With a
    budget in bytes a group has one curve over all its forms, dense, of few bits and of low rank, and the level is the
    same.
    """

    shares_bytes: ClassVar[bool] = True

    dense: bool = True
    floor_rank: int = 1
    floor_share: float = 0.05
    normalise: bool = False
    correction: Level = "off"

    def __post_init__(self) -> None:
        if self.floor_rank < 1:
            raise OptionError(f"water_level.floor_rank is {self.floor_rank}, but must be at least 1.")
        if not 0 <= self.floor_share <= 1:
            raise OptionError(f"water_level.floor_share is {self.floor_share:g}, but must lie in [0, 1].")

    def correction_level(self) -> Level:
        return self.correction

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        if budget.bytes is not None:
            return self._allocate_bytes(spectra, budget, budget.bytes)
        checked(spectra, budget)
        if budget.keep == 1 and self.dense:
            return [entry_at(s.group, None, budget) for s in spectra]
        groups = [spectrum.group for spectrum in spectra]
        curves = [self._curve(spectrum, budget) for spectrum in self._in_one_unit(spectra)]
        chosen = spend(curves, ledger.allowed_parameters(groups, budget.keep))
        if chosen is None:
            smallest = sum(int(curve.costs[0]) for curve in curves) / sum(group.parameters for group in groups)
            raise BudgetError(
                f"keep is {budget.keep:g}, but with floor_rank {self.floor_rank}, floor_share {self.floor_share:g} "
                f"and rank multiple {budget.rank_multiple} the smallest share is {smallest:.4f}; "
                "ask for more or lower them."
            )
        labels = [int(curve.label[i]) for curve, i in zip(curves, chosen, strict=True)]
        return [
            entry_at(group, None if label == DENSE else label, budget)
            for group, label in zip(groups, labels, strict=True)
        ]

    def _in_one_unit(self, spectra: Sequence[Spectrum]) -> list[Spectrum]:
        """The spectra with `nats` set to the weight that their squared errors have in the sum."""
        predicts = all(spectrum.nats is not None for spectrum in spectra)
        return [
            replace(s, nats=1 / max(s.energy, 1e-300) if self.normalise else s.nats if predicts else 1.0)
            for s in spectra
        ]

    def _allocate_bytes(self, spectra: Sequence[Spectrum], budget: Budget, most: int) -> list[Entry]:
        choices = [self._choices(spectrum, budget) for spectrum in self._in_one_unit(spectra)]
        curves = []
        for spectrum, entries in zip(self._in_one_unit(spectra), choices, strict=True):
            costs = [ledger.entry_bytes(spectrum.group, entry, budget.itemsize) for entry in entries]
            losses = [spectrum.predicted(entry) for entry in entries]
            curves.append(Curve.of(np.array(costs), np.array(losses, dtype=float), np.arange(len(entries))))
        chosen = spend(curves, most)
        if chosen is None:
            weights, least = sum(s.group.parameters for s in spectra), sum(int(curve.costs[0]) for curve in curves)
            raise BudgetError(
                f"the budget is {max(most, 0) * 8 / weights:.3f} bits per weight, but the fewest that these widths "
                f"reach are {least * 8 / weights:.3f}; ask for more."
            )
        return [entries[int(curve.label[i])] for entries, curve, i in zip(choices, curves, chosen, strict=True)]

    def _choices(self, spectrum: Spectrum, budget: Budget) -> list[Entry]:
        """Every form of a group that the rank multiple allows, cuts in the budget's storage, and the group as it is."""
        group, step = spectrum.group, max(budget.rank_multiple, RANK_STEP)
        cuts = self._ranks(group, step, ledger.admitted(group, budget.storage))
        forms = [form for form in spectrum.forms if (form.rank or 0) % budget.rank_multiple == 0]
        entries = [form.of(group) for form in forms] + [entry_at(group, rank, budget) for rank in cuts]
        return [*entries, entry_at(group, None, budget)] if self.dense else entries

    def _curve(self, spectrum: Spectrum, budget: Budget) -> Curve:
        group, weight = spectrum.group, spectrum.nats
        assert weight is not None
        storage = ledger.admitted(group, budget.storage)
        ranks = np.array(self._ranks(group, budget.rank_multiple, storage), dtype=np.int64)
        costs = np.array([ledger.parameters(group, int(r), storage) for r in ranks], dtype=np.int64)
        losses = spectrum.expected.numpy()[ranks] * weight
        if self.dense or not len(ranks):
            ranks, costs = np.append(ranks, DENSE), np.append(costs, group.parameters)
            losses = np.append(losses, 0.0)
        return Curve.of(costs, losses, ranks)

    def _ranks(self, group: Group, multiple: int, storage: str) -> list[int]:
        """Every rank that the floors and the multiple allow; full rank only where it can be stored, not dense."""
        full = group.full_rank
        floor = max(self.floor_rank, ceil(self.floor_share * full), 1)
        first = -(-floor // multiple) * multiple
        ranks = list(range(first, full, multiple))
        return ranks if self.dense or ledger.refusal(group, full, storage) else [*ranks, full]
