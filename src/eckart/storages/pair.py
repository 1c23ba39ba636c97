"""Pair: two factors side by side, `y = coefficients (basis x) + bias`."""

from collections.abc import Mapping
from fractions import Fraction
from math import floor
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from .base import FactorizedLayer, Pair, Size, Storage, checked_rank, fixed


class FactorizedLinear(FactorizedLayer):
    """`y = coefficients (basis x) + bias`: a linear layer of rank `rank`."""

    refinable: ClassVar[bool] = True
    divisible: ClassVar[bool] = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.basis = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.coefficients = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.coefficients(self.basis(x))
        return y

    @property
    def weight(self) -> Tensor:
        return self.coefficients.weight @ self.basis.weight

    @property
    def bias(self) -> Tensor | None:
        return self.coefficients.bias

    def spec(self) -> dict[str, Any]:
        return {"storage": "pair", "rank": self.rank}


@final
class PairStorage(Storage):
    """`rank * (in + sum of out)` numbers: a basis shared by a group is counted once."""

    shares_basis = True
    stacks = True

    def parameters(self, size: Size) -> int:
        return size.rank * (size.in_features + size.out_features)

    def largest_rank(self, out_features: int, in_features: int, allowance: Fraction | int) -> int:
        """May exceed the full rank."""
        return floor(Fraction(allowance) / (in_features + out_features))

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> FactorizedLinear:
        # A basis may be shared, and of a rank that one member alone could not have.
        rank = checked_rank(spec, in_features, "the input size", out_features, in_features)
        return FactorizedLinear(in_features, out_features, rank, bias, "meta", dtype)

    def of_pair(self, pair: Pair) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {"basis.weight": pair.basis, "coefficients.weight": pair.coefficients}
        tensors |= {} if pair.bias is None else {"coefficients.bias": pair.bias}
        return {"storage": "pair", "rank": len(pair.basis)}, tensors

    def to_pair(self, layer: FactorizedLinear) -> Pair:
        return Pair(layer.basis.weight, layer.coefficients.weight, layer.bias)

    def part(self, layer: FactorizedLinear, outputs: slice, inputs: slice) -> FactorizedLinear:
        return pair_of(layer.basis.weight[:, inputs], layer.coefficients.weight[outputs])


def pair_of(basis: Tensor, coefficients: Tensor) -> FactorizedLinear:
    """A layer without bias that holds these factors, `[rank, in]` and `[out, rank]`."""
    layer = FactorizedLinear(basis.shape[1], len(coefficients), len(basis), device="meta")
    layer.basis.weight, layer.coefficients.weight = fixed(basis), fixed(coefficients)
    return layer
