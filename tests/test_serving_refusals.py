"""What vLLM cannot serve is refused by name. Stand-ins take the place of vLLM, which need not be installed."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

NAME = "model.layers.0.self_attn"
PAIR = {"storage": "pair", "rank": 2}


class Layer(nn.Module):
    """A layer of vLLM; each of its kinds is a class of its own."""


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our module, imported with stand-ins for as much of vLLM as it names."""

    class Configuration:
        def __init__(self) -> None:
            self.packed_modules_mapping = {"qk_proj": ["q_proj", "k_proj"]}

    kinds = {name: type(name, (Layer,), {}) for name in ("QKVParallelLinear", "ReplicatedLinear", "RowParallelLinear")}
    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.distributed": {"get_pp_group": lambda: SimpleNamespace(world_size=1)},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": Layer,
            "LinearMethodBase": object,
            "UnquantizedLinearMethod": object,
            **kinds,
        },
        f"{layers}.quantization": {"register_quantization_config": lambda name: lambda made: made},
        f"{layers}.quantization.base_config": {"QuantizationConfig": Configuration},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"WeightsMapper": dict},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "eckart.engines.serving", raising=False)
    module = importlib.import_module("eckart.engines.serving")
    monkeypatch.setitem(sys.modules, "eckart.engines.serving", module)  # so that it goes with the stand-ins
    return module


def served(serving: Any, modules: dict[str, Any], name: str, outputs: list[int], tensors: list[Any]) -> Any:
    """Load tensors, each a `(parameter, tensor, shard)`, into the layer of this name, from 6 inputs, and finish it."""
    config, layer = serving.EckartServing(modules), serving.ReplicatedLinear()
    method = config.get_quant_method(layer, f"{NAME}.{name}")
    method.create_weights(layer, 6, outputs, 6, sum(outputs), torch.float32)
    for key, tensor, shard in tensors:
        parameter = layer.get_parameter(key)
        parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    return method.apply(layer, torch.eye(6)).T


def test_the_stand_ins_serve_a_pair_beside_a_dense_layer(serving: Any) -> None:
    basis, coefficients, dense = torch.randn(2, 6), torch.randn(4, 2), torch.randn(3, 6)
    tensors = [("basis.weight", basis, "q"), ("coefficients.weight", coefficients, "q"), ("weight", dense, "k")]
    weight = served(serving, {f"{NAME}.q_proj": PAIR}, "qk_proj", [4, 3], tensors)
    torch.testing.assert_close(weight, torch.cat([coefficients @ basis, dense]))


def test_stacks_of_experts_are_refused_before_anything_is_built(serving: Any) -> None:
    stack = {"storage": "experts", "of": "pair", "ranks": [2, 0]}
    config = {"quant_method": "eckart", "format_version": 1, "modules": {"model.layers.0.mlp.experts.up_proj": stack}}
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.mlp\.experts\.up_proj: is a stack .* cannot compute with"
    ):
        serving.EckartServing.from_config(config)


@pytest.mark.parametrize(
    ("modules", "name", "tensors", "words"),
    [
        (
            {"q_proj": PAIR},
            "q_proj",
            [("basis.weight", (2, 6), None)],
            "q_proj: cannot be served by vLLM: .*Missing key",
        ),
        (
            {"q_proj": PAIR},
            "q_proj",
            [("basis.weight", (2, 6), None), ("coefficients.weight", (5, 2), None)],
            "q_proj: cannot be served by vLLM: .*size mismatch",
        ),
        (
            {"q_proj": PAIR},
            "qk_proj",
            [("basis.weight", (2, 6), "q"), ("coefficients.weight", (4, 2), "q"), ("weight", (3, 5), "k")],
            r"k_proj: weight is \[3, 5\], but vLLM needs \[3, 6\]\.$",
        ),
        (
            {"q_proj": PAIR, "odd_proj": PAIR},
            "q_proj",
            [],
            r"odd_proj: is factorised, but vLLM builds no linear layer of that name \(1 such\); serve the dense model",
        ),
        (
            {"q_proj": {**PAIR, "basis_of": "model.layers.7.q_proj"}},
            "q_proj",
            [("coefficients.weight", (4, 2), None)],
            r"q_proj: reads the basis of model\.layers\.7\.q_proj, which is on another pipeline stage of vLLM\.$",
        ),
    ],
)
def test_what_cannot_be_served(
    serving: Any, modules: dict[str, Any], name: str, tensors: list[Any], words: str
) -> None:
    outputs = [4, 3] if name == "qk_proj" else [4]
    with pytest.raises(ValueError, match=rf"^{NAME}\.{words}") as caught:
        served(
            serving,
            {f"{NAME}.{key}": spec for key, spec in modules.items()},
            name,
            outputs,
            [(key, torch.zeros(shape), shard) for key, shape, shard in tensors],
        )
    assert str(caught.value).isprintable()


def test_few_bits_are_refused_before_anything_is_loaded(serving: Any) -> None:
    modules = {f"{NAME}.q_proj": {"storage": "packed", "bits": 4, "group": 64}, f"{NAME}.k_proj": PAIR}
    with pytest.raises(
        ValueError, match=rf"^{NAME}\.q_proj: has few bits, which cannot be served by vLLM yet \(1 such"
    ):
        serving.EckartServing.from_config({"modules": modules})
