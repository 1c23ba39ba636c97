"""The part of a factorised layer that one device computes, for servers that split a model: tensors in, layers out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eckart.portable.linear import empty_like
from eckart.storages import FactorizedLayer, find


def assemble(
    spec: Mapping[str, Any], in_features: int, out_features: int, tensors: Mapping[str, Tensor]
) -> FactorizedLayer:
    """A layer without bias from its entry in `modules` and its tensors, which are not copied.

    `tensors` are named as in the checkpoint (`docs/format.md`), less the layer's name. Raises
    `ValueError` or `RuntimeError` when one is missing, is too many, or has another shape.
    """
    layer = empty_like(nn.Linear(in_features, out_features, bias=False, device="meta"), spec)
    layer.load_state_dict(dict(tensors), assign=True)
    return layer.requires_grad_(False)


def part_of(layer: FactorizedLayer, outputs: slice, inputs: slice) -> FactorizedLayer:
    """The part of a layer without bias that gives `outputs` from `inputs`, contiguous ranges of whole numbers."""
    return find(layer.spec()["storage"]).part(layer, outputs, inputs)
