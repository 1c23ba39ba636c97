"""The linear layers of a model, dense and factorised, and the swap.

Checkpoints are read through this file too, so it travels with them: torch and the storages alone.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    from eckart.storages import FactorizedLayer, find
except ImportError:  # in a checkpoint, where the storages that it needs lie beside this file
    from .storages import FactorizedLayer, find  # type: ignore[import-not-found, no-redef]

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear`, subclasses that compute the same, and GPT-2's `Conv1D`, whose weight is transposed."""
    return type(module) is nn.Linear or _is_transposed(module) or _is_plain_subclass(module)


def is_factorized(module: nn.Module) -> "TypeIs[FactorizedLayer]":
    """True for the factorised layers of this package, whatever their storage."""
    return isinstance(module, FactorizedLayer)


_PROBED: dict[type, bool] = {}


def _is_plain_subclass(module: nn.Module) -> bool:
    """A subclass of `nn.Linear` with nothing but a weight and a bias, whose forward computes `W x + b`."""
    if not isinstance(module, nn.Linear) or module._modules or module._buffers:
        return False
    shape = (module.out_features, module.in_features)
    if set(module._parameters) != {"weight", "bias"} or module.weight.shape != shape:
        return False
    if type(module) not in _PROBED:
        _PROBED[type(module)] = _computes_linear(module)
    return _PROBED[type(module)]


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Try a small copy of a layer on a few numbers."""
    probe = copy.copy(module)
    probe.in_features, probe.out_features = 5, 3
    numbers = torch.linspace(-1, 2, 58, device="cpu") ** 3
    weight, bias, x = numbers[:15].view(3, 5), numbers[15:18], numbers[18:].view(2, 4, 5)
    probe._parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    probe._forward_hooks, probe._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        return torch.allclose(probe(x), nn.functional.linear(x, weight, bias), atol=1e-5)
    except Exception:  # whatever a foreign forward raises when its surroundings are missing
        return False


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
    weight: Tensor = next(module.parameters(), None)  # type: ignore[assignment]
    weight = module.weight if weight is None else weight  # of a packed layer, which has no parameters
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
