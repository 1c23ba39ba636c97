"""The contract of a storage: in how many numbers a matrix of low rank is kept, and the layer that computes with them.

A storage is one final class; its file's name is its name. It is asked by the ledger, by plans, by checkpoints, by
conversion and by servers, so that none of them knows it by name. This file travels with checkpoints: torch alone.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What is stored: a matrix `[out_features, in_features]` of rank `rank`, of which `kept` input columns are exact.

    Of `members` layers that read one basis the matrix is stacked along `out_features`. Where numbers are packed they
    have `bits` bits, and `group` inputs share a scale; a matrix that is packed as it is has rank 0 here.
    """

    out_features: int
    in_features: int
    rank: int
    kept: int = 0
    members: int = 1
    bits: int = 0
    group: int = 0

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class Pair:
    """A factorised layer in the form that all storages can be made of: `y = coefficients (basis x) + bias`.

    `basis` is `[rank, in]`, `coefficients` `[out, rank]`, `bias` `[out]`. With preserved columns `kept_index` `[kept]`
    holds their positions, rising, `kept` `[out, kept]` their part of the weight, and `basis` is `[rank, in - kept]`.
    """

    basis: Tensor
    coefficients: Tensor
    bias: Tensor | None = None
    kept_index: Tensor | None = None
    kept: Tensor | None = None


class FactorizedLayer(nn.Module):
    """The base of every factorised layer, whatever its storage.

    Its `basis` and `coefficients` are ordinary `nn.Linear` layers, so that adapters, quantisers and exporters treat
    them as such. `refinable`: both factors may be changed freely, and the layer stays what it is. `divisible`: a
    device may hold a part of each factor, by outputs or by inputs.
    """

    refinable: ClassVar[bool] = False
    divisible: ClassVar[bool] = False

    in_features: int
    out_features: int
    rank: int  # of a matrix that is packed as it is: 0
    basis: nn.Linear
    coefficients: nn.Linear
    bias: Any

    @property
    def weight(self) -> Tensor:
        """The product `[out, in]`, computed; for model code that reads it. Read only."""
        raise TypeError(f"{type(self).__name__} does not say what its weight is.")

    def spec(self) -> dict[str, Any]:
        """This layer's entry in a checkpoint's configuration; `Storage.empty` makes a layer from it."""
        raise TypeError(f"{type(self).__name__} does not say how it is stored.")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class Storage(ABC):
    """How a factorised layer is stored.

    `tensors` are the names of what a layer holds besides its bias, below the layer's own name. `shares_basis`: several
    layers may read one basis. `from_plain_pairs`: any pair can be stored so, which conversion needs. `reorders`: the
    layer moves its inputs or outputs into another order, which takes time. `stacks`: many layers of one shape can be
    kept as one stack, as the experts of a layer are. `packs`: numbers have few bits, so that a matrix is stored to
    rounding alone, nothing in it can be trained, and entries say `bits` and `group`; `low_rank`: it has two factors,
    and entries say `rank`.
    """

    tensors: ClassVar[tuple[str, ...]] = ("basis.weight", "coefficients.weight")
    shares_basis: ClassVar[bool] = False
    from_plain_pairs: ClassVar[bool] = True
    reorders: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    packs: ClassVar[bool] = False
    low_rank: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    # What it costs: whole numbers, no tensors.

    @abstractmethod
    def parameters(self, size: Size) -> int:
        """Numbers that are stored, indices not counted; a shared basis once."""

    def index_bytes(self, size: Size) -> int:
        """Bytes of the index arrays, which are not parameters."""
        return 0

    def bytes(self, size: Size, itemsize: int) -> int:
        """Bytes of everything, with `itemsize` of one number in the model's dtype."""
        return self.parameters(size) * itemsize + self.index_bytes(size)

    def largest_rank(self, out_features: int, in_features: int, allowance: Fraction | int) -> int:
        """Largest rank in at most `allowance` parameters; 0 if there is none."""
        ranks = range(1, min(out_features, in_features) + 1)
        return bisect_right(ranks, allowance, key=lambda rank: self.parameters(Size(out_features, in_features, rank)))

    def refusal(self, size: Size) -> str | None:
        """Why a matrix of this size cannot be stored so, in words that can follow "it"; None if it can."""
        if bool(size.bits) != self.packs:
            return "has bits" if size.bits else "has no bits"
        if bool(size.rank) != self.low_rank:
            return "has a rank" if size.rank else "has no rank"
        if size.members > 1 and not self.shares_basis:
            return "shares its basis"
        return "has preserved columns" if size.kept else None

    # What computes with it.

    @abstractmethod
    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> FactorizedLayer:
        """The layer of a checkpoint's entry, on the meta device. Raises `ValueError` for an entry that is not valid."""

    def check(self, layer: Any) -> None:
        """Raise `ValueError` when a layer holds what none of this storage can, such as an index that repeats."""

    @abstractmethod
    def of_pair(self, pair: Pair) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The entry and the tensors, bias included, that store a pair. Raises `ValueError` if they cannot.

        A storage that packs takes `bits` and `group` as well, and rounds each number to the nearest that there is.
        """

    @abstractmethod
    def to_pair(self, layer: Any) -> Pair:
        """The same matrix as a pair."""

    @abstractmethod
    def part(self, layer: Any, outputs: slice, inputs: slice) -> FactorizedLayer:
        """The part of a layer without bias that gives `outputs` from `inputs`, ranges of whole numbers.

        Parts by outputs are put side by side, parts by inputs are added up; either way they make the layer.
        """


def checked_rank(spec: Mapping[str, Any], most: int, why: str, out_features: int, in_features: int) -> int:
    """The rank of an entry. Raises `ValueError` unless it lies in `[1, most]`; `why` says in words what `most` is."""
    rank = spec.get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        raise ValueError(
            f"rank is {rank!r}, but it must be a whole number in [1, {most}], {why} of {out_features} x {in_features}."
        )
    return rank


def check_permutation(name: str, index: Tensor) -> None:
    """Raise `ValueError` unless an index holds each number of its range once. One on the meta device passes."""
    if not index.is_meta and not torch.equal(index.long().sort().values, torch.arange(len(index), device=index.device)):
        raise ValueError(f"{name} must hold every number below {len(index)} once, and does not; the file is damaged.")


def fixed(weight: Tensor) -> nn.Parameter:
    """A parameter for a part of a layer; parts are not trained."""
    return nn.Parameter(weight.contiguous(), requires_grad=False)
