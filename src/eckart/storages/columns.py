"""Columns: some input columns of the weight stay exact beside a pair for the others."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from .base import FactorizedLayer, Pair, Size, Storage, check_permutation, checked_rank, fixed
from .pair import FactorizedLinear, pair_of

INDEX_BYTES = 4  # of one entry of an index, int32


class KeptColumnsLinear(FactorizedLinear):
    """`y = coefficients (basis x_rest) + kept x_kept + bias`: a factorised layer with `kept` preserved columns.

    `column_order` `[in]`, int32, names the input columns: first those of the basis, then the kept
    ones, each part rising. So the input is gathered once and both products read a slice of it
    (`benchmarks/kept_columns.py`); and no index has to be derived after loading.
    """

    refinable: ClassVar[bool] = False
    divisible: ClassVar[bool] = False

    column_order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        kept: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features - kept, out_features, rank, bias, device, dtype)
        self.in_features, self.kept_columns = in_features, kept
        self.kept = nn.Linear(kept, out_features, bias=False, device=device, dtype=dtype)
        self.register_buffer("column_order", torch.arange(in_features, dtype=torch.int32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        # In two dimensions: torch 2.13 gathers the last of three ten to twenty times slower on a CPU.
        flat = x.reshape(-1, self.in_features).index_select(1, self.column_order)
        remaining = self.in_features - self.kept_columns
        y: Tensor = self.coefficients(self.basis(flat[:, :remaining]))
        strip = flat[:, remaining:]
        if type(self.kept) is nn.Linear and _alike(y, strip, self.kept.weight):
            y = y.addmm_(strip, self.kept.weight.T)  # no second [tokens, out]
        else:  # an adapter's or a quantiser's layer, autocast, or a weight that accelerate brings for the call
            y = y + self.kept(strip)
        return y.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        parts = torch.cat([self.coefficients.weight @ self.basis.weight, self.kept.weight], dim=1)
        return parts.index_select(1, self.column_order.long().argsort())

    def spec(self) -> dict[str, Any]:
        return {"storage": "columns", "rank": self.rank, "kept": self.kept_columns}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.kept_columns}"


def _alike(y: Tensor, *others: Tensor) -> bool:
    return all(t.dtype == y.dtype and t.device == y.device for t in others)


@final
class ColumnStorage(Storage):
    """`sum of out * kept + rank * (in + sum of out - kept)` numbers, and the order of the columns for each member.

    While the number of kept columns is still open (0), that is what a pair costs, which is the most it will be.
    """

    tensors = ("basis.weight", "coefficients.weight", "kept.weight", "column_order")
    shares_basis = True
    from_plain_pairs = False
    reorders = True

    def parameters(self, size: Size) -> int:
        both = size.in_features + size.out_features
        return size.kept * size.out_features + size.rank * (both - size.kept)

    def index_bytes(self, size: Size) -> int:
        return INDEX_BYTES * size.in_features * size.members if size.kept else 0

    def refusal(self, size: Size) -> str | None:
        most = size.in_features - size.rank
        return None if size.kept <= most else f"has room for at most {most} preserved columns"

    def empty(
        self, out_features: int, in_features: int, spec: Mapping[str, Any], *, bias: bool, dtype: torch.dtype
    ) -> KeptColumnsLinear:
        full = min(out_features, in_features)
        rank = checked_rank(spec, full, "the full rank", out_features, in_features)
        kept, most = spec.get("kept"), in_features - rank
        if not isinstance(kept, int) or isinstance(kept, bool) or not 1 <= kept <= most:
            raise ValueError(f"kept is {kept!r}, but it must be a whole number in [1, {most}], which is in - rank.")
        return KeptColumnsLinear(in_features, out_features, rank, kept, bias, "meta", dtype)

    def check(self, layer: KeptColumnsLinear) -> None:
        check_permutation("column_order", layer.column_order)
        remaining = layer.in_features - layer.kept_columns
        for part in (layer.column_order[:remaining], layer.column_order[remaining:]):
            if not part.is_meta and (part.diff() <= 0).any():
                raise ValueError("column_order must rise within each of its two parts; the file is damaged.")

    def of_pair(self, pair: Pair) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if pair.kept is None:
            raise ValueError("preserved columns have a storage of their own, which is not changed.")
        kept = pair.kept.shape[1]
        order = _order(pair.kept_index, kept, pair.basis.shape[1] + kept)
        tensors = {"basis.weight": pair.basis, "coefficients.weight": pair.coefficients}
        tensors |= {"kept.weight": pair.kept, "column_order": order}
        tensors |= {} if pair.bias is None else {"coefficients.bias": pair.bias}
        return {"storage": "columns", "rank": len(pair.basis), "kept": kept}, tensors

    def to_pair(self, layer: KeptColumnsLinear) -> Pair:
        remaining = layer.in_features - layer.kept_columns
        index = layer.column_order[remaining:].long()
        return Pair(layer.basis.weight, layer.coefficients.weight, layer.bias, index, layer.kept.weight)

    def part(self, layer: KeptColumnsLinear, outputs: slice, inputs: slice) -> FactorizedLayer:
        order, remaining = layer.column_order.long(), layer.in_features - layer.kept_columns
        here = (order >= inputs.start) & (order < inputs.stop)
        rest, strip = here[:remaining], here[remaining:]
        basis, kept = layer.basis.weight[:, rest], layer.kept.weight[outputs][:, strip]
        coefficients = layer.coefficients.weight[outputs]
        if not strip.any():  # each part of the order rises, so one alone is in place
            return pair_of(basis, coefficients)
        if not rest.any():
            return pair_of(torch.eye(kept.shape[1], dtype=kept.dtype, device=kept.device), kept)
        sizes = basis.shape[1] + kept.shape[1], len(coefficients), len(basis), kept.shape[1]
        part = KeptColumnsLinear(*sizes, device="meta")
        part.basis.weight, part.coefficients.weight, part.kept.weight = fixed(basis), fixed(coefficients), fixed(kept)
        part.column_order = (order[here] - inputs.start).to(layer.column_order.dtype)
        return part


def _order(kept_index: Tensor | None, kept: int, in_features: int) -> Tensor:
    """All columns, `[in]`, int32: the remaining ones, then the kept ones."""
    if kept_index is None or kept_index.shape != (kept,) or (kept_index.diff() <= 0).any():
        raise ValueError(f"{kept} preserved columns need as many rising positions in kept_index.")
    is_kept = torch.zeros(in_features, dtype=torch.bool, device=kept_index.device)
    is_kept[kept_index.long()] = True
    return torch.cat([(~is_kept).nonzero()[:, 0], kept_index.long()]).int()
