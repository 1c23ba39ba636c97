"""Uniform: every group keeps the same share of its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from eckart import ledger
from eckart.allocators.base import Allocator, checked, entry_for
from eckart.errors import BudgetError
from eckart.types import Budget, Entry, Spectrum


@final
@dataclass(frozen=True)
class Uniform(Allocator):
    """Rank `floor(keep * out * in / (out + in))` for each matrix stored as a pair, as in SVD-LLM.

    For a shared basis `out` is the sum over the group (Basis Sharing, arXiv 2410.03765). At
    `keep = 1` everything stays dense, which is exact; a pair of factors would not be. Another storage
    prices the ranks in its own way: a pivoted matrix has a higher one at the same share. With a budget in bytes every
    matrix is packed as it is, all in the most bits that the budget allows.
    """

    shares_bytes: ClassVar[bool] = True

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        if budget.bytes is not None:
            return self._in_most_bits(spectra, budget.bytes)
        checked(spectra, budget)
        return [entry_for(s.group, budget.keep, budget) for s in spectra]

    def _in_most_bits(self, spectra: Sequence[Spectrum], most: int) -> list[Entry]:
        by_bits = [{form.bits: form.of(s.group) for form in s.forms if form.rank is None} for s in spectra]
        least = 0
        for bits in sorted(set.intersection(*map(set, by_bits)), reverse=True):
            entries = [forms[bits] for forms in by_bits]
            least = sum(ledger.entry_bytes(s.group, e, 0) for s, e in zip(spectra, entries, strict=True))
            if least <= most:
                return entries
        weights = sum(s.group.parameters for s in spectra)
        raise BudgetError(
            f"the budget is {max(most, 0) * 8 / weights:.3f} bits per weight, but the fewest that these widths reach "
            f"are {least * 8 / weights:.3f}; ask for more."
        )
