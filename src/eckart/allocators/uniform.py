"""Uniform: every group keeps the same share of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from eckart.allocators.base import Allocator, checked, entry_for
from eckart.types import Budget, Entry, Spectrum


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """Rank `floor(keep * out * in / (out + in))` for each matrix stored as a pair, as in SVD-LLM.

    For a shared basis `out` is the sum over the group (Basis Sharing, arXiv 2410.03765). At
    `keep = 1` everything stays dense, which is exact; a pair of factors would not be. Another storage
    prices the ranks in its own way: a pivoted matrix has a higher one at the same share.
    """

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        return [entry_for(s.group, budget.keep, budget) for s in spectra]
