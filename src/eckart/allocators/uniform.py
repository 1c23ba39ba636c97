"""Uniform: every group keeps the same share of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from eckart import ledger
from eckart.allocators.base import Allocator, checked
from eckart.types import Budget, Entry, Spectrum


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """Rank `floor(keep * out * in / (out + in))` for each matrix, as in SVD-LLM.

    For a shared basis `out` is the sum over the group (Basis Sharing, arXiv 2410.03765). At
    `keep = 1` everything stays dense, which is exact; a pair of factors would not be.
    """

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        if budget.keep == 1:
            return [Entry(s.group.names, None) for s in spectra]
        entries = []
        for spectrum in spectra:
            group = spectrum.group
            rank = ledger.largest_rank(group, ledger.share(budget.keep) * group.parameters)
            rank = rank // budget.rank_multiple * budget.rank_multiple or min(rank, group.full_rank)
            entries.append(Entry(group.names, max(rank, 1)))
        return entries
