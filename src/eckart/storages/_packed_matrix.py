"""A matrix in few bits: packed codes, a scale and a zero for each row and group of inputs, and its product.

The tensors are those of the format `pack-quantized` of compressed-tensors, asymmetric with groups. Travels with
checkpoints: torch and its neighbours alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._packing import pack, unpack, words

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
SCALE_BYTES = 2  # a bfloat16
WORD_BYTES = 4
TENSORS = ("weight_packed", "weight_scale", "weight_zero_point")


def matrix_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Bytes of a packed matrix: codes, scales and zeros, and what packing fills up."""
    groups = -(-columns // group)
    return WORD_BYTES * (rows * words(columns, bits) + words(rows, bits) * groups) + SCALE_BYTES * rows * groups


def checked_bits(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group of an entry. Raises `ValueError` for values that there are none of."""
    bits, group = spec.get("bits"), spec.get("group")
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"bits is {bits!r}, but it must be one of {', '.join(map(str, WIDTHS))}.")
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"group is {group!r}, but it must be one of {', '.join(map(str, GROUPS))}.")
    return bits, group


def packed_tensors(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> dict[str, Tensor]:
    """What is stored of a matrix with `codes` `[rows, columns]`, and `scales` and `zeros` `[rows, groups]`."""
    zero_point = pack(zeros.T.contiguous(), bits).T.contiguous()
    return {"weight_packed": pack(codes, bits), "weight_scale": scales.bfloat16(), "weight_zero_point": zero_point}


def nearest_tensors(weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """What is stored of a matrix `[rows, columns]` rounded to nearest, on grids from its smallest to largest number."""
    rows, columns = weight.shape
    grouped = nn.functional.pad(weight.double(), (0, -columns % group)).view(rows, -1, group)
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = ((most - least) / (2**bits - 1)).bfloat16().double()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    zeros = (-least / scales).round().clamp(0, 2**bits - 1)
    codes = ((grouped / scales[..., None]).round() + zeros[..., None]).clamp(0, 2**bits - 1)
    return packed_tensors(codes.view(rows, -1)[:, :columns], scales, zeros, bits)


class PackedMatrix(nn.Module):
    """`y = W x` with W `[rows, columns]` in `bits` bits: `W = scale * (code - zero)`, groups of `group` columns.

    `weight_packed` `[rows, words]` int32; `weight_scale` `[rows, groups]` bfloat16, whatever dtype the model has;
    `weight_zero_point` `[words, groups]` int32, packed along the rows. No parameters: nothing here is trained.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self,
        columns: int,
        rows: int,
        bits: int,
        group: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.columns, self.rows, self.bits, self.group = columns, rows, bits, group
        self.model_dtype = dtype or torch.get_default_dtype()
        groups = -(-columns // group)
        packed = torch.zeros(rows, words(columns, bits), dtype=torch.int32, device=device)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.ones(rows, groups, dtype=torch.bfloat16, device=device))
        zero_point = torch.zeros(words(rows, bits), groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", zero_point)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W, `[rows, columns]`, computed in float32 and rounded to `dtype`."""
        codes = unpack(self.weight_packed, self.bits, self.columns)
        zeros = unpack(self.weight_zero_point.T, self.bits, self.rows).T
        exact = torch.promote_types(dtype, torch.float32)
        if shorter := -self.columns % self.group:
            codes = nn.functional.pad(codes, (0, shorter))
        weight = codes.to(exact).view(self.rows, -1, self.group)
        weight.sub_(zeros.to(exact)[..., None]).mul_(self.weight_scale.to(exact)[..., None])
        return weight.view(self.rows, -1)[:, : self.columns].to(dtype)

    def product(self, x: Tensor) -> Tensor:
        """`[..., columns]` to `[..., rows]`, in the dtype of `x`."""
        return nn.functional.linear(x, self.unpacked(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    @property
    def weight(self) -> Tensor:
        """W in the model's dtype, computed. Read only."""
        return self.unpacked(self.model_dtype)

    def part_of(self, rows: slice | Tensor, columns: slice) -> "PackedMatrix":
        """The part that gives some of the outputs, from inputs that end where groups do.

        Raises `ValueError` for a range of inputs that cuts a group, whose scale two devices would then need.
        """
        if columns.start % self.group or (columns.stop % self.group and columns.stop != self.columns):
            raise ValueError(
                f"inputs {columns.start} to {columns.stop} cut a group of {self.group} that shares a scale; "
                "write the model with --storage dense first."
            )
        groups = slice(columns.start // self.group, -(-columns.stop // self.group))
        codes = unpack(self.weight_packed, self.bits, self.columns)[rows, columns]
        zeros = unpack(self.weight_zero_point.T, self.bits, self.rows).T[rows, groups]
        part = PackedMatrix(codes.shape[1], len(codes), self.bits, self.group, "meta", self.model_dtype)
        tensors = packed_tensors(codes, self.weight_scale[rows, groups], zeros, self.bits)
        part.load_state_dict(tensors, assign=True)
        return part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """Moves to another device as ever; a cast leaves the scales what they are and changes the model's dtype."""
        scales = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.model_dtype = fn(torch.zeros((), dtype=self.model_dtype, device=scales.device)).dtype
        if self.weight_scale.dtype != scales.dtype:
            self.weight_scale = scales.to(self.weight_packed.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.columns}, out_features={self.rows}, bits={self.bits}, group={self.group}"
