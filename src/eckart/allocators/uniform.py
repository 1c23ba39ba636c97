"""Uniform: every group keeps the same share of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from eckart import ledger
from eckart.allocators.base import Allocator, checked
from eckart.types import Budget, Entry, Spectrum


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """Rank `floor(keep * out * in / (out + in))` for each matrix, as in SVD-LLM.

    For a shared basis `out` is the sum over the group (Basis Sharing, arXiv 2410.03765). At
    `keep = 1` everything stays dense, which is exact; a pair of factors would not be. `storage`
    prices the ranks: a pivoted matrix has a higher one at the same share.
    """

    storage: Literal["pair", "pivoted"] = "pair"

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        if budget.keep == 1:
            return [Entry(s.group.names, None) for s in spectra]
        entries = []
        for spectrum in spectra:
            group = spectrum.group
            rank = ledger.largest_rank(group, ledger.share(budget.keep) * group.parameters, self.storage)
            rank = max(1, rank // budget.rank_multiple * budget.rank_multiple or min(rank, group.full_rank))
            is_dense = self.storage == "pivoted" and rank >= group.full_rank  # which costs the same
            entries.append(Entry(group.names, None) if is_dense else Entry(group.names, rank, self.storage))
        return entries
