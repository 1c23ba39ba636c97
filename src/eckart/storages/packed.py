"""Packed: a matrix of full rank in few bits."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ._packed_matrix import TENSORS, PackedMatrix, checked_bits, matrix_bytes, nearest_tensors
from .base import FactorizedLayer, Pair, Size, Storage


class PackedLinear(PackedMatrix, FactorizedLayer):
    """`y = W x + bias` with W in `bits` bits."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bits, group, device, dtype)
        self.in_features, self.out_features, self.rank = in_features, out_features, 0
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def spec(self) -> dict[str, Any]:
        return {"storage": "packed", "bits": self.bits, "group": self.group}


@final
class PackedStorage(Storage):
    """`out * in` numbers of `bits` bits, and for each row and group of inputs a scale and a zero."""

    tensors = TENSORS
    from_plain_pairs = False
    packs = True
    low_rank = False

    def parameters(self, size: Size) -> int:
        return size.out_features * size.in_features

    def bytes(self, size: Size, itemsize: int) -> int:
        return matrix_bytes(size.out_features, size.in_features, size.bits, size.group)

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> PackedLinear:
        return PackedLinear(in_features, out_features, *checked_bits(spec), bias, "meta", dtype)

    def of_pair(self, pair: Pair, bits: int = 8, group: int = 64) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = nearest_tensors(pair.coefficients @ pair.basis, bits, group)
        tensors |= {} if pair.bias is None else {"bias": pair.bias}
        return {"storage": "packed", "bits": bits, "group": group}, tensors

    def to_pair(self, layer: PackedLinear) -> Pair:
        """A factor that is the identity, and the matrix."""
        weight = layer.weight
        identity = torch.eye(min(weight.shape), dtype=weight.dtype, device=weight.device)
        wide = weight.shape[0] <= weight.shape[1]
        return Pair(weight, identity, layer.bias) if wide else Pair(identity, weight, layer.bias)

    def part(self, layer: PackedLinear, outputs: slice, inputs: slice) -> FactorizedLayer:
        part = layer.part_of(outputs, inputs)
        whole = PackedLinear(part.columns, part.rows, part.bits, part.group, device="meta", dtype=part.model_dtype)
        whole.load_state_dict(part.state_dict(), assign=True)
        return whole
