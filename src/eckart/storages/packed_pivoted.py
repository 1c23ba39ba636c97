"""Packed pivoted: rows of the matrix in few bits, and the other rows as combinations of them, in as many."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ._packed_matrix import PackedMatrix, checked_bits, matrix_bytes, nearest_tensors
from .base import FactorizedLayer, Pair, Size, Storage, check_permutation, checked_rank
from .packed_pair import FACTORS
from .pivoted import PivotedStorage

INDEX_BYTES = 4  # of one entry of an index, int32


class PackedPivotedLinear(FactorizedLayer):
    """`p = basis x`, `q = coefficients p`, and output i is entry `index[i]` of `(p, q)`, plus its bias."""

    basis: Any
    coefficients: Any
    index: Tensor

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
        self.coefficients = PackedMatrix(rank, out_features - rank, bits, group, device, dtype)
        self.register_buffer("index", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        p = self.basis(x.reshape(-1, self.in_features))
        y: Tensor = torch.cat([p, self.coefficients(p)], -1).index_select(-1, self.index)
        y = y.reshape(*x.shape[:-1], len(self.index))
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        basis = self.basis.weight
        return torch.cat([basis, self.coefficients.weight @ basis]).index_select(0, self.index)

    def spec(self) -> dict[str, Any]:
        return {"storage": "packed_pivoted", "rank": self.rank, "bits": self.bits, "group": self.group}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


@final
class PackedPivotedStorage(Storage):
    """`rank * (in + out - rank)` numbers of `bits` bits, their scales and zeros, and the order of the outputs."""

    tensors = (*FACTORS, "index")
    from_plain_pairs = False
    packs = True
    reorders = True

    def parameters(self, size: Size) -> int:
        return size.rank * (size.in_features + size.out_features - size.rank)

    def index_bytes(self, size: Size) -> int:
        return INDEX_BYTES * size.out_features

    def bytes(self, size: Size, itemsize: int) -> int:
        basis = matrix_bytes(size.rank, size.in_features, size.bits, size.group)
        others = matrix_bytes(size.out_features - size.rank, size.rank, size.bits, size.group)
        return basis + others + self.index_bytes(size)

    def refusal(self, size: Size) -> str | None:
        return "has full rank" if size.rank >= size.full_rank else super().refusal(size)

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> PackedPivotedLinear:
        most = min(out_features, in_features) - 1
        rank = checked_rank(spec, most, "one below the full rank", out_features, in_features)
        return PackedPivotedLinear(in_features, out_features, rank, *checked_bits(spec), bias, "meta", dtype)

    def check(self, layer: PackedPivotedLinear) -> None:
        check_permutation("index", layer.index)

    def of_pair(self, pair: Pair, bits: int = 8, group: int = 64) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _, tensors = PivotedStorage().of_pair(Pair(pair.basis, pair.coefficients), "rows")
        factors = {name: tensors[f"{name}.weight"] for name in ("basis", "coefficients")}
        packed = {f"{f}.{name}": t for f, w in factors.items() for name, t in nearest_tensors(w, bits, group).items()}
        packed |= {"index": tensors["index"]} | ({} if pair.bias is None else {"bias": pair.bias})
        return {"storage": "packed_pivoted", "rank": len(pair.basis), "bits": bits, "group": group}, packed

    def to_pair(self, layer: PackedPivotedLinear) -> Pair:
        basis = layer.basis.weight
        identity = torch.eye(layer.rank, dtype=basis.dtype, device=basis.device)
        coefficients = torch.cat([identity, layer.coefficients.weight]).index_select(0, layer.index)
        return Pair(basis, coefficients, layer.bias)

    def part(self, layer: PackedPivotedLinear, outputs: slice, inputs: slice) -> FactorizedLayer:
        index = layer.index[outputs].long()
        computed = index >= layer.rank  # the others are outputs of the basis itself
        rows = index[computed] - layer.rank
        index[computed] = torch.arange(len(rows), device=index.device) + layer.rank
        basis = layer.basis.part_of(slice(0, layer.rank), inputs)
        coefficients = layer.coefficients.part_of(rows, slice(0, layer.rank))
        part = PackedPivotedLinear(
            basis.columns, len(rows) + layer.rank, layer.rank, layer.bits, layer.group, device="meta"
        )
        part.out_features, part.index = len(index), index.to(layer.index.dtype)
        part.basis, part.coefficients = basis, coefficients
        return part
