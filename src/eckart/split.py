"""The part of a factorised layer that one device computes: some of its outputs, from some of its inputs.

Tensors in, layers out, for servers that split a model. Parts by outputs are put side by side, parts by
inputs are added up; either way the parts of a layer make the layer.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from eckart.linear import FactorizedLinear, KeptColumnsLinear, PivotedLinear, empty_like

Tensor = torch.Tensor
Factorized = FactorizedLinear | PivotedLinear
Part = TypeVar("Part", bound=Factorized)


def assemble(spec: Mapping[str, Any], in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> Factorized:
    """A layer without bias from its entry in `modules` and its tensors, which are not copied.

    `tensors` are named as in the checkpoint (`docs/format.md`), less the layer's name. Raises
    `ValueError` or `RuntimeError` when one is missing, is too many, or has another shape.
    """
    layer = empty_like(nn.Linear(in_features, out_features, bias=False, device="meta"), spec)
    layer.load_state_dict(dict(tensors), assign=True)
    return layer.requires_grad_(False)


def part_of(layer: Factorized, outputs: slice, inputs: slice) -> Factorized:
    """The part of a layer without bias that gives `outputs` from `inputs`, contiguous ranges of whole numbers."""
    if isinstance(layer, KeptColumnsLinear):
        return _kept_columns(layer, outputs, inputs)
    if isinstance(layer, FactorizedLinear):
        return _pair(layer.basis.weight[:, inputs], layer.coefficients.weight[outputs])
    if layer.pivots == "rows":
        return _pivot_rows(layer, outputs, inputs)
    if inputs == slice(0, layer.in_features):
        return _pivoted(layer.basis.weight, layer.coefficients.weight[outputs], layer.index, "columns")
    # A device may lack inputs that are pivots, so the unit rows of the basis are written out.
    whole = layer.basis.weight.new_zeros(layer.rank, layer.in_features)
    index = layer.index.long()
    whole[torch.arange(layer.rank, device=index.device), index[: layer.rank]] = 1
    whole[:, index[layer.rank :]] = layer.basis.weight
    return _pair(whole[:, inputs], layer.coefficients.weight[outputs])


def _kept_columns(layer: KeptColumnsLinear, outputs: slice, inputs: slice) -> FactorizedLinear:
    order, remaining = layer.column_order.long(), layer.in_features - layer.kept_columns
    here = (order >= inputs.start) & (order < inputs.stop)
    rest, strip = here[:remaining], here[remaining:]
    basis, kept = layer.basis.weight[:, rest], layer.kept.weight[outputs][:, strip]
    coefficients = layer.coefficients.weight[outputs]
    if not strip.any():  # each part of the order rises, so one alone is in place
        return _pair(basis, coefficients)
    if not rest.any():
        return _pair(torch.eye(kept.shape[1], dtype=kept.dtype, device=kept.device), kept)
    sizes = basis.shape[1] + kept.shape[1], len(coefficients), len(basis), kept.shape[1]
    part = KeptColumnsLinear(*sizes, device="meta")
    part.kept.weight = _fixed(kept)
    part.column_order = (order[here] - inputs.start).to(layer.column_order.dtype)
    return _filled(part, basis, coefficients)


def _pivot_rows(layer: PivotedLinear, outputs: slice, inputs: slice) -> PivotedLinear:
    index = layer.index[outputs].long()
    computed = index >= layer.rank  # the others are outputs of the basis itself
    coefficients = layer.coefficients.weight[index[computed] - layer.rank]
    index[computed] = torch.arange(len(coefficients), device=index.device) + layer.rank
    return _pivoted(layer.basis.weight[:, inputs], coefficients, index.to(layer.index.dtype), "rows")


def _pair(basis: Tensor, coefficients: Tensor) -> FactorizedLinear:
    part = FactorizedLinear(basis.shape[1], len(coefficients), len(basis), device="meta")
    return _filled(part, basis, coefficients)


def _pivoted(basis: Tensor, coefficients: Tensor, index: Tensor, pivots: str) -> PivotedLinear:
    rank = len(basis)
    rows = pivots == "rows"
    sizes = (basis.shape[1], len(coefficients) + rank) if rows else (basis.shape[1] + rank, len(coefficients))
    part = PivotedLinear(*sizes, rank, device="meta", pivots=pivots)
    part.out_features = len(index) if rows else len(coefficients)
    part.index = index
    return _filled(part, basis, coefficients)


def _filled(part: Part, basis: Tensor, coefficients: Tensor) -> Part:
    part.basis.weight, part.coefficients.weight = _fixed(basis), _fixed(coefficients)
    return part


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
