"""Spend by the spectra what an allocator that goes by measured curves has left over."""

from collections.abc import Sequence

import numpy as np
import torch

from eckart import ledger
from eckart.allocators.base import entry_at
from eckart.maths.hull import Curve, spend
from eckart.types import Budget, Entry, Spectrum

DENSE = 0  # the label of the choice to leave a group dense


def spend_by_spectrum(
    spectra: Sequence[Spectrum], ranks: Sequence[int | None], allowed: int, budget: Budget
) -> list[Entry]:
    """Entries at these ranks (`None`: dense) or above, at most `allowed` parameters in all.

    Ranks rise where a parameter lowers the share of a group's energy that is discarded most; such shares are
    comparable between groups, squared errors of metrics without gradients are not.
    """
    curves = [_above(spectrum, rank, budget) for spectrum, rank in zip(spectra, ranks, strict=True)]
    chosen = spend(curves, allowed)
    assert chosen is not None  # the ranks themselves fit
    labels = [int(curve.label[index]) for curve, index in zip(curves, chosen, strict=True)]
    return [entry_at(s.group, None if n == DENSE else n, budget) for s, n in zip(spectra, labels, strict=True)]


def _above(spectrum: Spectrum, rank: int | None, budget: Budget) -> Curve:
    """Cost and discarded share of the energy at a rank and at all above it that the budget's steps allow."""
    group, storage = spectrum.group, ledger.admitted(spectrum.group, budget.storage)
    step, choices = budget.rank_multiple, [(group.parameters, 0.0, DENSE)]
    if rank is not None:
        tails = spectrum.tails / max(spectrum.energy, 1e-300)
        above = range((rank // step + 1) * step, group.full_rank + 1, step)
        candidates = [rank, *(above if spectrum.energy else ())]  # of nothing there is nothing to gain
        discarded = tails[torch.tensor(candidates).clamp(max=len(tails) - 1)].tolist()
        costs = [ledger.parameters(group, r, storage) for r in candidates]
        choices += zip(costs, discarded, candidates, strict=True)
    choices = [choice for choice in choices if choice[0] <= group.parameters]
    columns = [np.array(column) for column in zip(*choices, strict=True)]
    return Curve.of(columns[0].astype(np.int64), columns[1].astype(np.float64), columns[2].astype(np.int64))
