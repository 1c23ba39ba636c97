"""The linear layers of the package, dense and factorised, and the swap. Imports torch only.

Checkpoints are read through this file too, so its parameter names are part of the format
(`docs/format.md`): `<layer>.basis.weight` `[rank, in]`, `<layer>.coefficients.weight` `[out, rank]`,
`<layer>.coefficients.bias` `[out]`.
"""

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
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,operator,assignment]
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

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def empty_like(module: nn.Module, spec: dict[str, Any]) -> FactorizedLinear:
    """A factorised layer in the place of `module`, same device, dtype and mode, weights not yet set.

    `spec` is the layer's entry in a checkpoint's configuration: `{"storage": "pair", "rank": r}`.
    """
    if spec.get("storage") != "pair":
        raise ValueError(f"storage {spec.get('storage')!r} is not known to this version of eckart")
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    out_features, in_features = (columns, rows) if _is_transposed(module) else (rows, columns)
    new = FactorizedLinear(
        in_features, out_features, spec["rank"], module.bias is not None, weight.device, weight.dtype
    )
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

    `basis` is `[rank, in]`, `coefficients` `[out, rank]`.
    """
    old = model.get_submodule(name)
    new = empty_like(old, {"storage": "pair", "rank": basis.shape[0]})
    new.basis.weight.copy_(basis)
    new.coefficients.weight.copy_(coefficients)
    if old.bias is not None:
        new.coefficients.bias.copy_(old.bias)  # type: ignore[arg-type]
    swap_(model, name, new)
    return new


@torch.no_grad()
def share_basis_(owner: FactorizedLinear, user: FactorizedLinear) -> None:
    """Make `user` read the very tensor of `owner`'s basis."""
    user.basis.weight = owner.basis.weight
