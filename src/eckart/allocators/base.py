"""The contract of an allocator: spectra, a budget and the ledger in, one entry per group out.

An allocator never sees a model, a weight or a file. The budget says in which storage ranks are spent.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from eckart import ledger
from eckart.types import Budget, Entry, Group, Level, Spectrum


class Probe(Protocol):
    """The loss of a candidate plan, in nats per token: one entry for each spectrum, in order.

    `held_out` asks for the loss on windows on which no candidate was scored.
    """

    def __call__(self, entries: Sequence[Entry], held_out: bool = False) -> float: ...


@dataclass(frozen=True)
class Allocator(ABC):
    """Chooses ranks. The fields of the dataclass are the method's options.

    Some choose by more than spectra: `wants` names what is to be measured first (`eckart.measuring.scene`) and comes
    in `Spectrum.observed`. `shares_bytes` says that it knows what to do with `Budget.bytes`. `may_exceed`
    says that its plans may keep more than was asked.
    """

    wants: ClassVar[tuple[str, ...]] = ()
    shares_bytes: ClassVar[bool] = False

    @property
    def may_exceed(self) -> bool:
        return False

    @property
    def needs_predictions(self) -> bool:
        """Whether the model's loss is measured, which takes the logits of a next token."""
        return "sensitivity" in self.wants or self.probe_windows() is not None

    @abstractmethod
    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        """One entry for each spectrum, in order; never more parameters than the budget allows.

        Raises `BudgetError` when the budget cannot be met.
        """

    def correction_level(self) -> Level:
        """How much to spend on measuring how far predicted losses are off (`eckart.planning.correction`)."""
        return "off"

    def probe_windows(self) -> tuple[int, int] | None:
        """On how many calibration windows to measure candidate plans, and how many to hold out; None: on none.

        An allocator that names them is called through `search`.
        """
        return None

    def search(self, spectra: Sequence[Spectrum], budget: Budget, probe: Probe) -> list[Entry]:
        """As `allocate`, with a probe that measures the loss of candidate plans; most allocators do not use it."""
        return self.allocate(spectra, budget)


def entry_for(group: Group, keep: float, budget: Budget) -> Entry:
    """An entry that keeps at most the share `keep` of a group, in the budget's storage and steps; dense for 1."""
    return entry_at(group, ledger.rank_for(group, keep, budget), budget)


def entry_at(group: Group, rank: int | None, budget: Budget) -> Entry:
    """An entry at a rank, `None` dense, in the budget's storage where the group can have it."""
    storage = "pair" if rank is None else ledger.admitted(group, budget.storage)
    return Entry(group.names, rank, storage, own_bases=group.own_bases)


def checked(spectra: Sequence[Spectrum], budget: Budget) -> None:
    """Raise `BudgetError` unless the budget can be met; every allocator calls it first."""
    ledger.check_reachable([s.group for s in spectra], budget.keep, budget.rank_multiple, budget.storage)
