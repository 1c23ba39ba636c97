"""Put factors in the place of weights, one layer or a group with one basis, and change how a layer is stored."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eckart.model.operators import operator
from eckart.portable.linear import empty_like, is_factorized, share_basis_, swap_
from eckart.storages import FactorizedLayer, Pair, find
from eckart.types import Factors, Group


def factorize_group_(model: nn.Module, group: Group, factors: Factors) -> None:
    """Replace the members of a group by their factors, which share the basis."""
    for name, layer in factorized_layers(model, group, factors).items():
        swap_(model, name, layer)


def factorized_layers(model: nn.Module, group: Group, factors: Factors) -> dict[str, nn.Module]:
    """Layers for the members of a group, by name, which share the basis; the model stays as it is.

    Always pairs, with preserved columns if there are any, because refiners work on these; `store_` changes the
    storage afterwards.
    """
    strips = factors.kept or (None,) * len(group.targets)
    layers = {
        name: _layer(model, name, Pair(factors.basis, coefficients, None, factors.kept_index, strip))
        for name, coefficients, strip in zip(group.names, factors.coefficients, strips, strict=True)
    }
    owner, *others = layers.values()
    for other in others:
        share_basis_(owner, other)
    return dict(layers)


def packed_layers(
    model: nn.Module, group: Group, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The layer, by name, for the one member of a group that is stored in few bits; the model stays as it is.

    `spec` is its entry in a configuration, `tensors` what it stores but for the bias, which is that of the layer there.
    """
    (target,) = group.targets
    old = operator(model, target.name)
    bias = {} if old.bias is None else {"bias": old.bias}
    layer = _filled(old.module, dict(spec), {**tensors, **bias})
    return {target.name: layer}


def factorize_(
    model: nn.Module,
    name: str,
    basis: Tensor,
    coefficients: Tensor,
    kept_index: Tensor | None = None,
    kept: Tensor | None = None,
) -> FactorizedLayer:
    """Replace the linear layer `name` by its factors, keeping bias, device, dtype and mode; returns the new layer.

    `basis` is `[rank, in]`, `coefficients` `[out, rank]`; with preserved columns at `kept_index`
    `[kept]`, `kept` is `[out, kept]` and `basis` `[rank, in - kept]`. Raises `ValueError` for any other
    shape.
    """
    layer = _layer(model, name, Pair(basis, coefficients, None, kept_index, kept))
    swap_(model, name, layer)
    return layer


def store_(model: nn.Module, name: str, storage: str, **choices: Any) -> nn.Module:
    """Store the factorised layer `name` of a model in another way; returns the layer that is there afterwards.

    `choices` are the storage's own (pivoted: `pivots`). Raises `ValueError` when the layer cannot be stored so.
    """
    old = model.get_submodule(name)
    if not is_factorized(old):
        raise ValueError(f"{name}: is a {type(old).__name__}, not a factorised layer; there is nothing to store.")
    before, after = find(old.spec()["storage"]), find(storage)
    if before is after:
        return old
    if before.packs:
        raise ValueError(f"{name}: has few bits, which another storage would not have; dequantize() makes it dense.")
    if not (before.from_plain_pairs and after.from_plain_pairs):
        raise ValueError(f"{name}: preserved columns have a storage of their own, which is not changed.")
    layer = _filled(old, *after.of_pair(before.to_pair(old), **choices))
    swap_(model, name, layer)
    return layer


@torch.no_grad()
def _layer(model: nn.Module, name: str, pair: Pair) -> FactorizedLayer:
    """A factorised layer to replace `name`, with the bias of the layer that is there."""
    old = operator(model, name)
    out_features, in_features = old.shape
    basis, coefficients = pair.basis, pair.coefficients
    rank, columns = basis.shape[0], 0 if pair.kept is None else pair.kept.shape[1]
    if basis.shape != (rank, in_features - columns) or coefficients.shape != (out_features, rank):
        raise ValueError(
            f"{name}: basis is {list(basis.shape)} and coefficients {list(coefficients.shape)}, but a weight "
            f"[{out_features}, {in_features}] with {columns} preserved columns needs "
            f"[rank, {in_features - columns}] and [{out_features}, rank]."
        )
    spec, tensors = find("columns" if columns else "pair").of_pair(replace(pair, bias=old.bias))
    return _filled(old.module, spec, tensors)


@torch.no_grad()
def _filled(old: nn.Module, spec: dict[str, Any], tensors: dict[str, Tensor]) -> FactorizedLayer:
    """A layer with this entry and these tensors, to replace an old one."""
    new = empty_like(old, spec)
    new.load_state_dict(tensors)
    return new
