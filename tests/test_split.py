"""The parts of a split layer make the layer, in every storage form; the oracle is the layer's dense product."""

import pytest
import torch
from torch import nn

from eckart.engines.parts import assemble, part_of
from eckart.portable.linear import empty_like

IN, OUT = 12, 20
SPECS = {
    "pair": {"storage": "pair", "rank": 5},
    "columns": {"storage": "columns", "rank": 5, "kept": 3},
    "columns, all kept on one device": {"storage": "columns", "rank": 4, "kept": 6},
    "rows": {"storage": "pivoted", "rank": 7, "pivots": "rows"},
    "rows, more rank than a part has outputs": {"storage": "pivoted", "rank": 11, "pivots": "rows"},
    "columns pivoted": {"storage": "pivoted", "rank": 7, "pivots": "columns"},
}


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for key, empty in empty_like(nn.Linear(IN, OUT, bias=False), SPECS[name]).state_dict().items():
        tensors[key] = torch.randperm(len(empty)).int() if key == "index" else torch.randn(empty.shape)
    if "column_order" in tensors:
        kept = SPECS[name]["kept"]
        last = list(range(IN))[-kept:] if kept == 6 else [1, 4, 9]
        tensors["column_order"] = torch.tensor([i for i in range(IN) if i not in last] + last, dtype=torch.int32)
    return tensors


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_parts_make_the_layer(name: str, devices: int) -> None:
    layer = assemble(SPECS[name], IN, OUT, tensors_of(name))
    dense, x = layer.weight, torch.randn(2, 3, IN)
    wide, deep = OUT // devices, IN // devices
    by_outputs = [part_of(layer, slice(i * wide, (i + 1) * wide), slice(0, IN))(x) for i in range(devices)]
    torch.testing.assert_close(torch.cat(by_outputs, -1), x @ dense.T, rtol=0, atol=1e-4)
    parts = [part_of(layer, slice(0, OUT), slice(i * deep, (i + 1) * deep)) for i in range(devices)]
    by_inputs = [part(x[..., i * deep : (i + 1) * deep]) for i, part in enumerate(parts)]
    torch.testing.assert_close(torch.stack(by_inputs).sum(0), x @ dense.T, rtol=0, atol=1e-4)


def test_a_part_by_outputs_is_smaller() -> None:
    for name in SPECS:
        layer = assemble(SPECS[name], IN, OUT, tensors_of(name))
        part = part_of(layer, slice(0, OUT // 2), slice(0, IN))
        assert part.coefficients.weight.numel() < layer.coefficients.weight.numel()


def test_a_missing_or_misshapen_tensor_is_named() -> None:
    tensors = tensors_of("pair")
    with pytest.raises(RuntimeError, match=r"coefficients\.weight"):
        assemble(SPECS["pair"], IN, OUT, {"basis.weight": tensors["basis.weight"]})
    with pytest.raises(RuntimeError, match=r"basis\.weight"):
        assemble(SPECS["pair"], IN, OUT, {**tensors, "basis.weight": tensors["basis.weight"].T})
