"""The contract of an allocator: spectra, a budget and the ledger in, one entry per group out.

An allocator never sees a model, a weight or a file.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from eckart import ledger
from eckart.types import Budget, Entry, Spectrum


@dataclass(frozen=True)
class Allocator(ABC):
    """Chooses ranks. The fields of the dataclass are the method's options."""

    @abstractmethod
    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        """One entry for each spectrum, in order; never more parameters than the budget allows.

        Raises `BudgetError` when the budget cannot be met.
        """


def checked(spectra: Sequence[Spectrum], budget: Budget) -> None:
    """Raise `BudgetError` unless the budget can be met; every allocator calls it first."""
    ledger.check_reachable([s.group for s in spectra], budget.keep, budget.rank_multiple)
