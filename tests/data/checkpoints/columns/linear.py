"""The linear layers of the package, dense and factorised, and the swap. Imports torch only.

Checkpoints are read through this file too, so its parameter names are part of the format
(`docs/format.md`): `<layer>.basis.weight` `[rank, in]`, `<layer>.coefficients.weight` `[out, rank]`,
`<layer>.coefficients.bias` `[out]`; with preserved columns also `<layer>.kept.weight` `[out, kept]` and
`<layer>.column_order` `[in]`; of a pivoted layer `<layer>.index` and `<layer>.bias` `[out]`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Tensor = torch.Tensor


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and for GPT-2's `Conv1D`, which stores its weight transposed."""
    return type(module) is nn.Linear or _is_transposed(module)


def is_factorized(module: nn.Module) -> "TypeIs[FactorizedLinear | PivotedLinear]":
    """True for the factorised layers of this package, whatever their storage."""
    return isinstance(module, FactorizedLinear | PivotedLinear)


def _is_transposed(module: nn.Module) -> bool:
    """`Conv1D` of transformers, known by its structure: `nx` inputs, `nf` outputs, weight `[nx, nf]`."""
    nx, nf = getattr(module, "nx", None), getattr(module, "nf", None)
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.shape == (nx, nf)


def weight_view(module: nn.Module) -> Tensor:
    """The weight as `[out, in]`, sharing memory with the module's own, detached."""
    if is_factorized(module):
        raise TypeError(f"a {type(module).__name__} has no dense weight to view; read .weight for its product")
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if _is_transposed(module) else weight


class FactorizedLinear(nn.Module):
    """`y = coefficients (basis x) + bias`: a linear layer of rank `rank`.

    `basis` and `coefficients` are ordinary `nn.Linear` layers, so that adapters, quantisers and
    exporters treat them as such.
    """

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
        """The product `[out, in]`, computed; for model code that reads it. Read only."""
        return self.coefficients.weight @ self.basis.weight

    @property
    def bias(self) -> Tensor | None:
        return self.coefficients.bias

    def spec(self) -> dict[str, Any]:
        """This layer's entry in a checkpoint's configuration; `empty_like` builds a layer from it."""
        return {"storage": "pair", "rank": self.rank}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class KeptColumnsLinear(FactorizedLinear):
    """`y = coefficients (basis x_rest) + kept x_kept + bias`: a factorised layer with `kept` preserved columns.

    `column_order` `[in]`, int32, names the input columns: first those of the basis, then the kept
    ones, each part rising. So the input is gathered once and both products read a slice of it
    (`benchmarks/kept_columns.py`); and no index has to be derived after loading.
    """

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
        """The whole `[out, in]`, computed; for model code that reads it. Read only."""
        parts = torch.cat([self.coefficients.weight @ self.basis.weight, self.kept.weight], dim=1)
        return parts.index_select(1, self.column_order.long().argsort())

    def spec(self) -> dict[str, Any]:
        return {"storage": "columns", "rank": self.rank, "kept": self.kept_columns}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.kept_columns}"


def _alike(y: Tensor, *others: Tensor) -> bool:
    return all(t.dtype == y.dtype and t.device == y.device for t in others)


class PivotedLinear(nn.Module):
    """A linear layer of rank `rank` in `rank (out + in - rank)` numbers (`eckart.pivot`).

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
        """The product `[out, in]`, computed; for model code that reads it. Read only."""
        if self.pivots == "rows":
            rest = self.coefficients.weight @ self.basis.weight
            return torch.cat([self.basis.weight, rest]).index_select(0, self.index)
        rest = self.coefficients.weight @ self.basis.weight
        return torch.cat([self.coefficients.weight, rest], 1).index_select(1, torch.argsort(self.index))

    def spec(self) -> dict[str, Any]:
        """This layer's entry in a checkpoint's configuration; `empty_like` builds a layer from it."""
        return {"storage": "pivoted", "rank": self.rank, "pivots": self.pivots}

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, pivots={self.pivots!r}"


def empty_like(module: nn.Module, spec: Mapping[str, Any]) -> FactorizedLinear | PivotedLinear:
    """A factorised layer in the place of `module`, same device, dtype and mode, weights not yet set.

    `spec` is the layer's entry in a checkpoint's configuration: `{"storage": "pair", "rank": r}`,
    `{"storage": "columns", "rank": r, "kept": c}` or `{"storage": "pivoted", "rank": r, "pivots": "rows"}`.
    This is the only place that knows how each storage is built. `module` is dense or itself factorised.
    Raises `ValueError` for a storage, rank, side or number of columns that cannot be.
    """
    out_features, in_features = module.weight.shape if is_factorized(module) else weight_view(module).shape
    storage, rank, full = spec.get("storage"), spec.get("rank"), min(out_features, in_features)
    if storage not in ("pair", "pivoted", "columns"):
        raise ValueError(f"storage is {storage!r}, which this eckart does not know; install a newer one.")
    largest, name = (full - 1, "one below the full rank") if storage == "pivoted" else (full, "the full rank")
    if storage == "pair":  # a basis may be shared, and of a rank that one member alone could not have
        largest, name = in_features, "the input size"
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= largest:
        raise ValueError(
            f"rank is {rank!r}, but it must be a whole number in [1, {largest}], {name} of "
            f"{out_features} x {in_features}."
        )
    weight: Tensor = next(module.parameters())
    bias = module.bias is not None
    new: FactorizedLinear | PivotedLinear
    # By way of meta: building on the device would draw random weights, in time and from the caller's generator.
    if storage == "pair":
        new = FactorizedLinear(in_features, out_features, rank, bias, "meta", weight.dtype)
    elif storage == "pivoted":
        pivots = spec.get("pivots")
        if pivots not in ("rows", "columns"):
            raise ValueError(f"pivots is {pivots!r}, but it must be 'rows' or 'columns'.")
        new = PivotedLinear(in_features, out_features, rank, bias, "meta", weight.dtype, pivots=pivots)
    else:
        kept = _checked_kept(spec.get("kept"), in_features - rank)
        new = KeptColumnsLinear(in_features, out_features, rank, kept, bias, "meta", weight.dtype)
    if not weight.is_meta:
        new.to_empty(device=weight.device)
    new.requires_grad_(weight.requires_grad)
    return new.train(module.training)


def _checked_kept(kept: Any, most: int) -> int:
    if not isinstance(kept, int) or isinstance(kept, bool) or not 1 <= kept <= most:
        raise ValueError(f"kept is {kept!r}, but it must be a whole number in [1, {most}], which is in - rank.")
    return kept


def swap_(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the submodule `name`; returns the module that was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old: nn.Module = getattr(parent, leaf)
    setattr(parent, leaf, new)
    return old


def share_basis_(owner: FactorizedLinear, user: FactorizedLinear) -> None:
    """Make `user` read the very tensor of `owner`'s basis. Raises `ValueError` if their shapes differ."""
    mine, theirs = user.basis.weight, owner.basis.weight
    if mine.shape != theirs.shape:
        raise ValueError(f"a basis {list(theirs.shape)} cannot serve a layer that needs {list(mine.shape)}.")
    user.basis.weight = theirs
