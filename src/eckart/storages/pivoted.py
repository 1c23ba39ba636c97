"""Pivoted: a matrix of rank r in `r (out + in - r)` numbers, exactly the degrees of freedom that it has."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from .base import FactorizedLayer, Pair, Size, Storage, check_permutation, checked_rank, fixed
from .pair import pair_of

INDEX_BYTES = 4  # of one entry of an index, int32


class PivotedLinear(FactorizedLayer):
    """A linear layer of rank `rank` in `rank (out + in - rank)` numbers (`eckart.maths.pivot`).

    `pivots = "rows"`: `p = basis x`, `q = coefficients p`, and output i is entry `index[i]` of `(p, q)`.
    `pivots = "columns"`: with `(a, b)` the inputs in the order of `index`, `y = coefficients (a + basis b)`.
    """

    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pivots: str = "rows",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.pivots = in_features, out_features, rank, pivots
        rest_in, rest_out = (0, rank) if pivots == "rows" else (rank, 0)
        self.basis = nn.Linear(in_features - rest_in, rank, bias=False, device=device, dtype=dtype)
        self.coefficients = nn.Linear(rank, out_features - rest_out, bias=False, device=device, dtype=dtype)
        permuted = out_features if pivots == "rows" else in_features
        self.register_buffer("index", torch.arange(permuted, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        flat = x.reshape(-1, self.in_features)  # in two dimensions, as in `KeptColumnsLinear`
        if self.pivots == "rows":
            p = self.basis(flat)
            y: Tensor = torch.cat([p, self.coefficients(p)], -1).index_select(-1, self.index)
        else:
            flat = flat.index_select(-1, self.index)
            y = self.coefficients(flat[:, : self.rank] + self.basis(flat[:, self.rank :]))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        rest = self.coefficients.weight @ self.basis.weight
        if self.pivots == "rows":
            return torch.cat([self.basis.weight, rest]).index_select(0, self.index)
        return torch.cat([self.coefficients.weight, rest], 1).index_select(1, torch.argsort(self.index))

    def spec(self) -> dict[str, Any]:
        return {"storage": "pivoted", "rank": self.rank, "pivots": self.pivots}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pivots={self.pivots!r}"


@final
class PivotedStorage(Storage):
    """`rank * (in + out - rank)` numbers, and the order of the smaller side's rows or columns."""

    tensors = ("basis.weight", "coefficients.weight", "index")
    reorders = True
    stacks = True

    def parameters(self, size: Size) -> int:
        return size.rank * (size.in_features + size.out_features - size.rank)

    def index_bytes(self, size: Size) -> int:
        return INDEX_BYTES * size.full_rank

    def refusal(self, size: Size) -> str | None:
        return "has full rank" if size.rank >= size.full_rank else super().refusal(size)

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> PivotedLinear:
        most = min(out_features, in_features) - 1
        rank = checked_rank(spec, most, "one below the full rank", out_features, in_features)
        pivots = spec.get("pivots")
        if pivots not in ("rows", "columns"):
            raise ValueError(f"pivots is {pivots!r}, but it must be 'rows' or 'columns'.")
        return PivotedLinear(in_features, out_features, rank, bias, "meta", dtype, pivots=pivots)

    def check(self, layer: PivotedLinear) -> None:
        check_permutation("index", layer.index)

    def of_pair(self, pair: Pair, pivots: Any = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`pivots` chooses the side, "rows" or "columns"; by default the smaller one."""
        matrix = _pivoting().pivoted(pair.basis, pair.coefficients, pivots)
        tensors = {"basis.weight": matrix.basis, "coefficients.weight": matrix.coefficients, "index": matrix.index}
        tensors |= {} if pair.bias is None else {"bias": pair.bias}
        return {"storage": "pivoted", "rank": len(pair.basis), "pivots": matrix.pivots}, tensors

    def to_pair(self, layer: PivotedLinear) -> Pair:
        """Coefficients come out orthonormal, so that rounding the pair adds no more error than rounding the weight."""
        maths = _pivoting()
        matrix = maths.Pivoted(layer.basis.weight, layer.coefficients.weight, layer.index, layer.pivots)
        basis, coefficients = maths.unpivoted(matrix)
        return Pair(basis, coefficients, layer.bias)

    def part(self, layer: PivotedLinear, outputs: slice, inputs: slice) -> FactorizedLayer:
        if layer.pivots == "rows":
            return _part_of_rows(layer, outputs, inputs)
        if inputs == slice(0, layer.in_features):
            return _pivoted(layer.basis.weight, layer.coefficients.weight[outputs], layer.index, "columns")
        # A device may lack inputs that are pivots, so the unit rows of the basis are written out.
        whole = layer.basis.weight.new_zeros(layer.rank, layer.in_features)
        index = layer.index.long()
        whole[torch.arange(layer.rank, device=index.device), index[: layer.rank]] = 1
        whole[:, index[layer.rank :]] = layer.basis.weight
        return pair_of(whole[:, inputs], layer.coefficients.weight[outputs])


def _pivoting() -> Any:
    """The maths of pivoting, which what only computes with a checkpoint does not need and may lack."""
    try:
        from eckart.maths import pivot
    except ImportError:
        raise ValueError("changing a storage needs eckart; this is the code of a checkpoint alone.") from None
    return pivot


def _part_of_rows(layer: PivotedLinear, outputs: slice, inputs: slice) -> PivotedLinear:
    index = layer.index[outputs].long()
    computed = index >= layer.rank  # the others are outputs of the basis itself
    coefficients = layer.coefficients.weight[index[computed] - layer.rank]
    index[computed] = torch.arange(len(coefficients), device=index.device) + layer.rank
    return _pivoted(layer.basis.weight[:, inputs], coefficients, index.to(layer.index.dtype), "rows")


def _pivoted(basis: Tensor, coefficients: Tensor, index: Tensor, pivots: str) -> PivotedLinear:
    rank = len(basis)
    rows = pivots == "rows"
    sizes = (basis.shape[1], len(coefficients) + rank) if rows else (basis.shape[1] + rank, len(coefficients))
    part = PivotedLinear(*sizes, rank, device="meta", pivots=pivots)
    part.out_features = len(index) if rows else len(coefficients)
    part.index = index
    part.basis.weight, part.coefficients.weight = fixed(basis), fixed(coefficients)
    return part
