"""One ledger for parameters and bytes, used by every allocator, plan, checkpoint and report.

What is counted: the weights of the targets. A bias, an embedding, a norm or a head is never
compressed and appears only in the totals of the whole model.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import floor

from eckart.errors import BudgetError, PlanError
from eckart.types import Entry, Group

STORAGES = ("pair", "pivoted", "columns")
INDEX_BYTES = 4  # of one entry of an index, int32


def parameters(group: Group, rank: int | None, storage: str = "pair", kept: int | None = None) -> int:
    """Stored parameters of a group at a rank; `None` is dense.

    A pair stores `rank * (in + sum of out)`: a basis shared by the group is counted once. Pivoted
    storage spends `rank^2` less, exactly the degrees of freedom of a matrix of that rank. Storage
    "columns" with `kept` columns stores `sum of out * kept + rank * (in + sum of out - kept)`, and no
    more than the pair while their number is still open (`None`).
    """
    if rank is None:
        return group.parameters
    if storage == "columns" and kept:
        return kept * group.out_features + rank * (group.in_features + group.out_features - kept)
    if storage == "columns":
        storage = "pair"
    if storage == "pair":
        return rank * (group.in_features + group.out_features)
    if storage == "pivoted":
        return rank * (group.in_features + group.out_features - rank)
    raise PlanError(f"{group.name}: storage {storage!r} is unknown. Known: {', '.join(STORAGES)}.")


def index_bytes(group: Group, rank: int | None, storage: str = "pair", kept: int | None = None) -> int:
    """Bytes of the index arrays of a storage, which are not parameters.

    Pivoted storage permutes the smaller side of the matrix: one int32 for each of its rows or columns.
    A layer with preserved columns stores the order of its input columns, one int32 each.
    """
    if rank is not None and storage == "pivoted":
        return INDEX_BYTES * group.full_rank
    if rank is None or storage != "columns" or not kept:
        return 0
    return INDEX_BYTES * group.in_features * len(group.targets)


def largest_rank(group: Group, allowance: Fraction | int, storage: str = "pair") -> int:
    """Largest rank whose parameters fit in `allowance`; may be 0, and of a pair may exceed the full rank."""
    if storage != "pivoted":
        return floor(Fraction(allowance) / parameters(group, 1, storage))
    return bisect_right(range(1, group.full_rank + 1), allowance, key=lambda rank: parameters(group, rank, storage))


def share(keep: float) -> Fraction:
    """The share as the decimal number that the user wrote: 0.8 is 4/5, not its binary neighbour."""
    return Fraction(repr(float(keep)))


def allowed_parameters(groups: Sequence[Group], keep: float) -> int:
    """Integer number of parameters that a share `keep` of these groups allows."""
    return floor(share(keep) * sum(group.parameters for group in groups))


def check_reachable(groups: Sequence[Group], keep: float, rank_multiple: int = 1) -> None:
    """Raise `BudgetError` unless `0 < keep <= 1` and every group can have its smallest rank."""
    if not 0 < keep <= 1:
        raise BudgetError(
            f"keep is {keep:g}, but it is the share of parameters kept and must lie in (0, 1]; 0.8 keeps 80 %."
        )
    smallest = sum(min(parameters(group, min(rank_multiple, group.full_rank)), group.parameters) for group in groups)
    total = sum(group.parameters for group in groups)
    if smallest > allowed_parameters(groups, keep):
        raise BudgetError(
            f"keep is {keep:g}, but the smallest reachable share is {smallest / total:.4f} (every "
            f"matrix at rank {rank_multiple}); ask for a share in [{smallest / total:.4f}, 1]."
        )


@dataclass(frozen=True)
class Ledger:
    """What a plan costs. `*_parameters` count numbers, `*_bytes` bytes at the model's dtype, indices included."""

    target_parameters_dense: int
    target_parameters_kept: int
    model_parameters_dense: int
    model_parameters_kept: int
    model_bytes_dense: int
    model_bytes_kept: int

    @property
    def keep(self) -> float:
        """Share of the targets' parameters that is kept."""
        return self.target_parameters_kept / self.target_parameters_dense

    @property
    def keep_model(self) -> float:
        """Share of the whole model's parameters that is kept."""
        return self.model_parameters_kept / self.model_parameters_dense

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "keep": self.keep, "keep_model": self.keep_model}


def make_ledger(groups: Iterable[Group], entries: Iterable[Entry], model_parameters: int, bytes_each: int) -> Ledger:
    """Add up a plan. `model_parameters` counts every distinct parameter of the dense model once.

    `bytes_each` is the size of one parameter of the model's dtype.
    """
    by_name, entries = {group.name: group for group in groups}, list(entries)
    dense = sum(group.parameters for group in by_name.values())
    kept = sum(parameters(by_name[e.name], e.rank, e.storage, e.kept) for e in entries)
    index = sum(index_bytes(by_name[e.name], e.rank, e.storage, e.kept) for e in entries)
    whole = model_parameters - dense + kept
    return Ledger(dense, kept, model_parameters, whole, model_parameters * bytes_each, whole * bytes_each + index)


def assert_within(ledger: Ledger, keep: float) -> None:
    """The promise of every allocator: never more than was asked."""
    allowed = floor(share(keep) * ledger.target_parameters_dense)
    if ledger.target_parameters_kept > allowed:
        raise BudgetError(
            f"the plan keeps {ledger.target_parameters_kept} parameters, but keep {keep:g} allows "
            f"{allowed} of {ledger.target_parameters_dense}."
        )
