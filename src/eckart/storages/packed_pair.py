"""Packed pair: two factors side by side, each in few bits."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ._packed_matrix import TENSORS, PackedMatrix, checked_bits, matrix_bytes, nearest_tensors
from .base import FactorizedLayer, Pair, Size, Storage, checked_rank

FACTORS = tuple(f"{factor}.{name}" for factor in ("basis", "coefficients") for name in TENSORS)


class PackedPairLinear(FactorizedLayer):
    """`y = coefficients (basis x) + bias`, both factors in `bits` bits."""

    basis: Any
    coefficients: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bits: int,
        group: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.bits, self.group = (
            in_features, out_features, rank, bits, group
        )  # fmt: skip
        self.basis = PackedMatrix(in_features, rank, bits, group, device, dtype)
        self.coefficients = PackedMatrix(rank, out_features, bits, group, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.coefficients(self.basis(x))
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        product: Tensor = self.coefficients.weight @ self.basis.weight
        return product

    def spec(self) -> dict[str, Any]:
        return {"storage": "packed_pair", "rank": self.rank, "bits": self.bits, "group": self.group}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


@final
class PackedPairStorage(Storage):
    """`rank * (in + out)` numbers of `bits` bits, and the scales and zeros of both factors."""

    tensors = FACTORS
    from_plain_pairs = False
    packs = True

    def parameters(self, size: Size) -> int:
        return size.rank * (size.in_features + size.out_features)

    def bytes(self, size: Size, itemsize: int) -> int:
        basis = matrix_bytes(size.rank, size.in_features, size.bits, size.group)
        return basis + matrix_bytes(size.out_features, size.rank, size.bits, size.group)

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> PackedPairLinear:
        most = min(out_features, in_features)
        rank = checked_rank(spec, most, "the full rank", out_features, in_features)
        return PackedPairLinear(in_features, out_features, rank, *checked_bits(spec), bias, "meta", dtype)

    def of_pair(self, pair: Pair, bits: int = 8, group: int = 64) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"basis.{name}": t for name, t in nearest_tensors(pair.basis, bits, group).items()}
        tensors |= {f"coefficients.{name}": t for name, t in nearest_tensors(pair.coefficients, bits, group).items()}
        tensors |= {} if pair.bias is None else {"bias": pair.bias}
        return {"storage": "packed_pair", "rank": len(pair.basis), "bits": bits, "group": group}, tensors

    def to_pair(self, layer: PackedPairLinear) -> Pair:
        return Pair(layer.basis.weight, layer.coefficients.weight, layer.bias)

    def part(self, layer: PackedPairLinear, outputs: slice, inputs: slice) -> FactorizedLayer:
        basis = layer.basis.part_of(slice(0, layer.rank), inputs)
        coefficients = layer.coefficients.part_of(outputs, slice(0, layer.rank))
        part = PackedPairLinear(basis.columns, coefficients.rows, layer.rank, layer.bits, layer.group, device="meta")
        part.basis, part.coefficients = basis, coefficients
        return part
