"""The linear layers of a model, dense and factorised, and the swap.

Checkpoints are read through this file too, so it travels with them: torch and the storages alone.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

try:
    from eckart.storages import FactorizedLayer, find
except ImportError:  # in a checkpoint, where the storages that it needs lie beside this file
    from .storages import FactorizedLayer, find  # type: ignore[import-not-found, no-redef]

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and for GPT-2's `Conv1D`, which stores its weight transposed."""
    return type(module) is nn.Linear or _is_transposed(module)


def is_factorized(module: nn.Module) -> "TypeIs[FactorizedLayer]":
    """True for the factorised layers of this package, whatever their storage."""
    return isinstance(module, FactorizedLayer)


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


def shape_of(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a linear layer, dense or factorised; multiplies no factors."""
    if is_factorized(module):
        return module.out_features, module.in_features
    out_features, in_features = weight_view(module).shape
    return out_features, in_features


def empty_like(module: nn.Module, spec: Mapping[str, Any]) -> FactorizedLayer:
    """A factorised layer in the place of `module`, same device, dtype and mode, weights not yet set.

    `spec` is the layer's entry in a checkpoint's configuration: `{"storage": "pair", "rank": r}` and what else the
    storage wants. `module` is dense or itself factorised. Raises `ValueError` for an entry that cannot be.
    """
    weight: Tensor = next(module.parameters())
    # By way of meta: building on the device would draw random weights, in time and from the caller's generator.
    new = find(spec.get("storage")).empty(*shape_of(module), spec, bias=module.bias is not None, dtype=weight.dtype)
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


def share_basis_(owner: FactorizedLayer, user: FactorizedLayer) -> None:
    """Make `user` read the very tensor of `owner`'s basis. Raises `ValueError` if their shapes differ."""
    mine, theirs = user.basis.weight, owner.basis.weight
    if mine.shape != theirs.shape:
        raise ValueError(f"a basis {list(theirs.shape)} cannot serve a layer that needs {list(mine.shape)}.")
    user.basis.weight = theirs
