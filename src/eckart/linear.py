"""The linear layers of the package, dense and factorised, and the swap. Imports torch only.

Checkpoints are read through this file too, so its parameter names are part of the format
(`docs/format.md`): `<layer>.basis.weight` `[rank, in]`, `<layer>.coefficients.weight` `[out, rank]`,
`<layer>.coefficients.bias` `[out]`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and for GPT-2's `Conv1D`, which stores its weight transposed."""
    return type(module) is nn.Linear or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """`Conv1D` of transformers, known by its structure: `nx` inputs, `nf` outputs, weight `[nx, nf]`."""
    nx, nf = getattr(module, "nx", None), getattr(module, "nf", None)
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.shape == (nx, nf)


def weight_view(module: nn.Module) -> Tensor:
    """The weight as `[out, in]`, sharing memory with the module's own, detached."""
    if isinstance(module, FactorizedLinear):
        raise TypeError("a FactorizedLinear has no dense weight to view; read .weight for its product")
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


def empty_like(module: nn.Module, spec: Mapping[str, Any]) -> FactorizedLinear:
    """A factorised layer in the place of the dense `module`, same device, dtype and mode, weights not yet set.

    `spec` is the layer's entry in a checkpoint's configuration: `{"storage": "pair", "rank": r}`. This is
    the only place that knows how each storage is built. Raises `ValueError` for a storage or rank that
    cannot be.
    """
    out_features, in_features = weight_view(module).shape
    storage, rank, full = spec.get("storage"), spec.get("rank"), min(out_features, in_features)
    if storage != "pair":
        raise ValueError(f"storage is {storage!r}, which this eckart does not know; install a newer one.")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= full:
        raise ValueError(
            f"rank is {rank!r}, but it must be a whole number in [1, {full}], the full rank of "
            f"{out_features} x {in_features}."
        )
    weight: Tensor = module.weight  # type: ignore[assignment]
    # By way of meta: building on the device would draw random weights, in time and from the caller's generator.
    new = FactorizedLinear(in_features, out_features, rank, module.bias is not None, "meta", weight.dtype)
    if not weight.is_meta:
        new.to_empty(device=weight.device)
    new.requires_grad_(weight.requires_grad)
    return new.train(module.training)


def swap_(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the submodule `name`; returns the module that was there."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old: nn.Module = getattr(parent, leaf)
    setattr(parent, leaf, new)
    return old


@torch.no_grad()
def factorize_(model: nn.Module, name: str, basis: Tensor, coefficients: Tensor) -> FactorizedLinear:
    """Replace the linear layer `name` by its factors, keeping bias, device, dtype and mode.

    `basis` is `[rank, in]`, `coefficients` `[out, rank]`. Raises `ValueError` for any other shape.
    """
    old = model.get_submodule(name)
    out_features, in_features = weight_view(old).shape
    rank = basis.shape[0]
    if basis.shape != (rank, in_features) or coefficients.shape != (out_features, rank):
        raise ValueError(
            f"{name}: basis is {list(basis.shape)} and coefficients {list(coefficients.shape)}, but a weight "
            f"[{out_features}, {in_features}] needs [rank, {in_features}] and [{out_features}, rank]."
        )
    new = empty_like(old, {"storage": "pair", "rank": rank})
    new.basis.weight.copy_(basis)
    new.coefficients.weight.copy_(coefficients)
    if old.bias is not None:
        new.coefficients.bias.copy_(old.bias)  # type: ignore[arg-type]
    swap_(model, name, new)
    return new


def share_basis_(owner: FactorizedLinear, user: FactorizedLinear) -> None:
    """Make `user` read the very tensor of `owner`'s basis. Raises `ValueError` if their shapes differ."""
    mine, theirs = user.basis.weight, owner.basis.weight
    if mine.shape != theirs.shape:
        raise ValueError(f"a basis {list(theirs.shape)} cannot serve a layer that needs {list(mine.shape)}.")
    user.basis.weight = theirs
