"""Packed sum: a matrix in few bits, plus a low-rank correction of what rounding left, in 8."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ._packed_matrix import TENSORS, PackedMatrix, checked_bits, matrix_bytes, nearest_tensors
from .base import FactorizedLayer, Pair, Size, Storage, checked_rank
from .packed_pair import FACTORS

CORRECTION_BITS = 8


class PackedSumLinear(PackedMatrix, FactorizedLayer):
    """`y = W x + coefficients (basis x) + bias` with W in `bits` bits and the factors in 8."""

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
        super().__init__(in_features, out_features, bits, group, device, dtype)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.basis = PackedMatrix(in_features, rank, CORRECTION_BITS, group, device, dtype)
        self.coefficients = PackedMatrix(rank, out_features, CORRECTION_BITS, group, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = self.product(x) + self.coefficients(self.basis(x))
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        corrected: Tensor = self.unpacked(self.model_dtype) + self.coefficients.weight @ self.basis.weight
        return corrected

    def spec(self) -> dict[str, Any]:
        return {"storage": "packed_sum", "rank": self.rank, "bits": self.bits, "group": self.group}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


@final
class PackedSumStorage(Storage):
    """`out * in` numbers of `bits` bits and `rank * (in + out)` of 8, with their scales and zeros."""

    tensors = (*TENSORS, *FACTORS)
    from_plain_pairs = False
    packs = True

    def parameters(self, size: Size) -> int:
        return size.out_features * size.in_features + size.rank * (size.in_features + size.out_features)

    def bytes(self, size: Size, itemsize: int) -> int:
        matrix = matrix_bytes(size.out_features, size.in_features, size.bits, size.group)
        basis = matrix_bytes(size.rank, size.in_features, CORRECTION_BITS, size.group)
        return matrix + basis + matrix_bytes(size.out_features, size.rank, CORRECTION_BITS, size.group)

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> PackedSumLinear:
        most = min(out_features, in_features)
        rank = checked_rank(spec, most, "the full rank", out_features, in_features)
        return PackedSumLinear(in_features, out_features, rank, *checked_bits(spec), bias, "meta", dtype)

    def of_pair(self, pair: Pair, bits: int = 8, group: int = 64) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The matrix rounded, and as many directions as the pair has of what that left."""
        product = pair.coefficients @ pair.basis
        whole = PackedMatrix(product.shape[1], product.shape[0], bits, group, product.device, torch.float64)
        whole.load_state_dict(nearest_tensors(product, bits, group))
        u, s, vt = torch.linalg.svd(product.double() - whole.weight, full_matrices=False)
        rank = len(pair.basis)
        factors = {"basis": s[:rank, None] * vt[:rank], "coefficients": u[:, :rank]}
        tensors = dict(whole.state_dict())
        for factor, weight in factors.items():
            tensors |= {f"{factor}.{n}": t for n, t in nearest_tensors(weight, CORRECTION_BITS, group).items()}
        tensors |= {} if pair.bias is None else {"bias": pair.bias}
        return {"storage": "packed_sum", "rank": rank, "bits": bits, "group": group}, tensors

    def to_pair(self, layer: PackedSumLinear) -> Pair:
        """A factor that is the identity, and the matrix: the sum has full rank."""
        weight = layer.weight
        identity = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
        wide = weight.shape[0] <= weight.shape[1]
        return Pair(weight, identity, layer.bias) if wide else Pair(identity, weight, layer.bias)

    def part(self, layer: PackedSumLinear, outputs: slice, inputs: slice) -> FactorizedLayer:
        matrix, whole = layer.part_of(outputs, inputs), slice(0, layer.rank)
        part = PackedSumLinear(matrix.columns, matrix.rows, layer.rank, layer.bits, layer.group, device="meta")
        for name in TENSORS:
            setattr(part, name, getattr(matrix, name))
        part.basis, part.coefficients = layer.basis.part_of(whole, inputs), layer.coefficients.part_of(outputs, whole)
        part.model_dtype = layer.model_dtype
        return part
