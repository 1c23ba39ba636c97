"""One ledger for parameters and bytes, used by every allocator, plan, checkpoint and report.

What is counted: the weights of the targets. A bias, an embedding, a norm or a head is never
compressed and appears only in the totals of the whole model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor

from eckart import storages
from eckart.errors import BudgetError, PlanError
from eckart.storages import Size, Storage
from eckart.types import Budget, Entry, Group


def storage_of(group: Group, storage: str) -> Storage:
    """The storage of a name. Raises `PlanError` that names the group for an unknown one."""
    try:
        return storages.find(storage)
    except ValueError:
        names = ", ".join(storages.names())
        raise PlanError(f"{group.name}: storage {storage!r} is unknown. Known: {names}.") from None


def size_of(
    group: Group, rank: int, kept: int | None = None, bits: int | None = None, inputs: int | None = None
) -> Size:
    """The size of one matrix of a group at a rank; `kept` None, a number that is still open, counts as 0.

    Rank 0 is a matrix that is packed as it is, in `bits` bits with a scale for `inputs` inputs.
    """
    members = 1 if group.own_bases else len(group.targets)
    return Size(group.out_features, group.in_features, rank, kept or 0, members, bits or 0, inputs or 0)


def size_of_entry(group: Group, entry: Entry) -> Size:
    """The size of one matrix of a group as an entry, which is not dense, stores it."""
    return size_of(group, entry.rank or 0, entry.kept, entry.bits, entry.group)


def entry_parameters(group: Group, entry: Entry) -> int:
    """Numbers that an entry stores, whatever bits they have. A basis shared by the group is counted once."""
    if entry.is_dense:
        return group.parameters
    return group.matrices * storage_of(group, entry.storage).parameters(size_of_entry(group, entry))


def entry_bytes(group: Group, entry: Entry, bytes_each: int) -> int:
    """Bytes that an entry stores: numbers, scales, zeros, indices, padding; `bytes_each` is of the model's dtype."""
    if entry.is_dense:
        return group.parameters * bytes_each
    return group.matrices * storage_of(group, entry.storage).bytes(size_of_entry(group, entry), bytes_each)


def admitted(group: Group, storage: str) -> str:
    """The storage if a group can have it at low rank, else "pair": a group that shares its basis may not."""
    return storage if refusal(group, 1, storage) is None else "pair"


def refusal(
    group: Group,
    rank: int,
    storage: str,
    kept: int | None = None,
    bits: int | None = None,
    inputs: int | None = None,
) -> str | None:
    """Why a group cannot be stored so at a rank, in words that can follow "it"; None if it can."""
    kind = storage_of(group, storage)
    if group.of_experts and not kind.stacks:
        return "is an expert, which are stored as stacks of pairs or pivoted ones"
    return kind.refusal(size_of(group, rank, kept, bits, inputs))


def parameters(group: Group, rank: int | None, storage: str = "pair", kept: int | None = None) -> int:
    """Stored parameters of a group at a rank; `None` is dense. A basis shared by the group is counted once."""
    if rank is None:
        return group.parameters
    return group.matrices * storage_of(group, storage).parameters(size_of(group, rank, kept))


def index_bytes(group: Group, rank: int | None, storage: str = "pair", kept: int | None = None) -> int:
    """Bytes of the index arrays of a storage, which are not parameters."""
    if rank is None:
        return 0
    return group.matrices * storage_of(group, storage).index_bytes(size_of(group, rank, kept))


def largest_rank(group: Group, allowance: Fraction | int, storage: str = "pair") -> int:
    """Largest rank whose parameters fit in `allowance`; may be 0, and of a pair may exceed the full rank."""
    of_one = Fraction(allowance) / group.matrices if group.matrices > 1 else allowance
    return storage_of(group, storage).largest_rank(group.out_features, group.in_features, of_one)


def rank_for(group: Group, keep: float, budget: Budget) -> int | None:
    """The rank that keeps at most the share `keep` of a group's parameters in the budget's storage, in its steps.

    In [1, full rank]; below the first step any rank is allowed. `None` (dense) for a share of 1, and for a rank that
    the storage refuses, since it would cost as much as the weight.
    """
    if keep >= 1:
        return None
    storage = admitted(group, budget.storage)
    rank = rounded(largest_rank(group, share(keep) * group.parameters, storage), group, budget.rank_multiple)
    return None if refusal(group, rank, storage) else rank


def rounded(rank: int, group: Group, multiple: int) -> int:
    """Round a rank down to a multiple, into [1, full rank]; below the first multiple any rank is allowed."""
    rank = min(rank, group.full_rank)
    return max(1, rank // multiple * multiple or rank)


def share(keep: float) -> Fraction:
    """The share as the decimal number that the user wrote: 0.8 is 4/5, not its binary neighbour."""
    return Fraction(repr(float(keep)))


def allowed_parameters(groups: Sequence[Group], keep: float) -> int:
    """Integer number of parameters that a share `keep` of these groups allows."""
    return floor(share(keep) * sum(group.parameters for group in groups))


def check_reachable(groups: Sequence[Group], keep: float, rank_multiple: int = 1, storage: str = "pair") -> None:
    """Raise `BudgetError` unless `0 < keep <= 1` and every group can have its smallest rank."""
    if not 0 < keep <= 1:
        raise BudgetError(
            f"keep is {keep:g}, but it is the share of parameters kept and must lie in (0, 1]; 0.8 keeps 80 %."
        )
    steps = ((g, parameters(g, min(rank_multiple, g.full_rank), admitted(g, storage))) for g in groups)
    smallest = sum(min(cost, group.parameters) for group, cost in steps)
    total = sum(group.parameters for group in groups)
    if smallest > allowed_parameters(groups, keep):
        raise BudgetError(
            f"keep is {keep:g}, but the smallest reachable share is {smallest / total:.4f} (every "
            f"matrix at rank {rank_multiple}); ask for a share in [{smallest / total:.4f}, 1]."
        )


@dataclass(frozen=True)
class Ledger:
    """What a plan costs. `*_parameters` count numbers, `*_bytes` bytes at the model's dtype, indices included.

    `bits` is of a plan with few bits alone: bytes of the targets in bits, for each of their weights before.
    """

    target_parameters_dense: int
    target_parameters_kept: int
    model_parameters_dense: int
    model_parameters_kept: int
    model_bytes_dense: int
    model_bytes_kept: int
    bits: float | None = None

    @property
    def keep(self) -> float:
        """Share of the targets' parameters that is kept."""
        return self.target_parameters_kept / self.target_parameters_dense

    @property
    def keep_model(self) -> float:
        """Share of the whole model's parameters that is kept."""
        return self.model_parameters_kept / self.model_parameters_dense

    def to_dict(self) -> dict[str, float]:
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        return {**facts, "keep": self.keep, "keep_model": self.keep_model}


def make_ledger(groups: Iterable[Group], entries: Iterable[Entry], model_parameters: int, bytes_each: int) -> Ledger:
    """Add up a plan. `model_parameters` counts every distinct parameter of the dense model once.

    `bytes_each` is the size of one parameter of the model's dtype.
    """
    by_name, entries = {group.name: group for group in groups}, list(entries)
    dense = sum(group.parameters for group in by_name.values())
    kept = stored = 0
    for e in entries:
        group = by_name[e.name]
        kept += entry_parameters(group, e)
        stored += entry_bytes(group, e, bytes_each)
    bits = stored * 8 / dense if any(e.bits is not None for e in entries) else None
    whole = model_parameters - dense + kept
    rest = (model_parameters - dense) * bytes_each
    return Ledger(dense, kept, model_parameters, whole, model_parameters * bytes_each, rest + stored, bits)


def assert_within_bytes(stored: int, most: int) -> None:
    """Raise `BudgetError` when what a plan stores of the targets takes more than it may, which allocators promise."""
    if stored > most:
        raise BudgetError(f"the plan takes {stored} bytes for the targets, but may take {most}.")


def assert_within(ledger: Ledger, keep: float) -> None:
    """Raise `BudgetError` when a plan keeps more than the share `keep`, which every allocator promises not to."""
    allowed = floor(share(keep) * ledger.target_parameters_dense)
    if ledger.target_parameters_kept > allowed:
        raise BudgetError(
            f"the plan keeps {ledger.target_parameters_kept} parameters, but keep {keep:g} allows "
            f"{allowed} of {ledger.target_parameters_dense}."
        )
