"""What blocks hand to one another beside the states: each stream has its own, and gradients go back along it."""

import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import ModelError
from eckart.model.discovery import discover
from eckart.model.forms import Form, form_of
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, pass_blocks, prove, run_tail, walk
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.tiny import tiny_models

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import architectures
import families

IDS = torch.randint(5, 90, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "zaya", "glm_moe_dsa", "xlnet", "deepseek_v4"])
def test_gradients_are_those_of_autograd_through_the_whole_model(family: str) -> None:
    model = families.build(family)
    assert architectures.gradient_gap(model, discover(model), IDS) < 1e-5


class Owner(nn.Module):
    """Fills the mapping for later blocks, and returns something for the next one."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.keys = inner, nn.Linear(width, width)

    def forward(
        self, hidden_states: Tensor, memory: Tensor | None = None, shared: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        out = self.inner(hidden_states, **options)
        shared["keys"] = (self.keys(out),)
        return out, out * 2


class User(Owner):
    """Reads both."""

    def forward(
        self, hidden_states: Tensor, memory: Tensor | None = None, shared: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        assert memory is not None
        out = self.inner(hidden_states, **options) + shared["keys"][0].tanh() + memory.sin()
        return out, memory + 1


def handing_on() -> Any:
    """A model whose first block leaves something for the second in both ways."""
    torch.manual_seed(0)
    model = tiny_models()["llama"]()
    layers = model.model.layers
    layers[0], layers[1] = Owner(layers[0], 32), User(layers[1], 32)
    real = model.model.forward

    def forward(*args: Any, **options: Any) -> Any:
        shared: MutableMapping[str, Any] = {}
        last: list[Any] = [None]
        blocks = [layer.forward for layer in layers]

        def through(block: Any) -> Any:
            def run(hidden: Tensor, **kwargs: Any) -> Tensor:
                kwargs.pop("shared", None)
                hidden, last[0] = block(hidden, memory=last[0], shared=shared, **kwargs)
                return hidden

            return run

        for layer, block in zip(layers, blocks, strict=True):
            layer.__dict__["forward"] = through(block)
        try:
            return real(*args, **options)
        finally:
            for layer, block in zip(layers, blocks, strict=True):
                layer.__dict__.pop("forward")
                if getattr(block, "__self__", None) is not layer:  # a stand-in of a walk
                    layer.__dict__["forward"] = block

    model.model.forward = forward
    return model


@torch.no_grad()
def test_streams_do_not_see_what_others_left() -> None:
    model = handing_on()
    layout = discover(model)
    residence = residence_of(model, layout)
    prove(model, residence, IDS[0])
    expected = model(input_ids=IDS).logits
    first = open_stream(model, residence, [IDS])
    second = first.branch([first.states[0] * 3])
    for _ in walk(residence, first, second):
        pass
    assert torch.allclose(run_tail(model, residence, first, 0).logits, expected, atol=1e-5)
    alone = open_stream(model, residence, [IDS])
    alone.states[0] = alone.states[0] * 3
    pass_blocks(residence, alone)
    assert torch.equal(alone.states[0], second.states[0])
    assert not torch.allclose(alone.states[0], first.states[0])


def test_gradients_take_both_ways_back() -> None:
    model = handing_on()
    layout = discover(model)
    assert architectures.gradient_gap(model, layout, IDS) < 1e-5
    # Batches of other sizes, too.
    whole, parts = (
        {n: s for block in sweep(model, layout, IDS, [Need.TRUE_GRADIENT_GRAM], batch_tokens=size) for n, s in
         block.items()}
        for size in (100, 22)
    )  # fmt: skip
    for name in whole:
        one, other = (s[name].gradient_gram or s[name].pulled_gradient_gram for s in (whole, parts))
        if one is None or other is None:  # nothing reads the last one's keys
            assert name == "model.layers.1.keys"
            continue
        assert torch.allclose(one.matrix, other.matrix, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_block_that_is_left_out_leaves_states_as_they_are() -> None:
    model = tiny_models()["llama"]()
    model.model.layers.insert(1, model.model.layers[1])
    model.config.num_hidden_layers = 3
    layers = model.model.layers
    kept = [layers[0], layers[2]]
    real = model.model.forward

    def forward(*args: Any, **options: Any) -> Any:
        model.model.layers = nn.ModuleList(kept)
        try:
            return real(*args, **options)
        finally:
            model.model.layers = layers

    layers[1] = tiny_models()["llama"]().model.layers[1]  # weights of its own
    model.model.forward = forward
    residence = residence_of(model, discover(model))
    expected = model(input_ids=IDS).logits
    stream = open_stream(model, residence, [IDS])
    pass_blocks(residence, stream)
    assert torch.allclose(run_tail(model, residence, stream, 0).logits, expected, atol=1e-5)


def test_blocks_that_run_out_of_order_are_refused() -> None:
    model = tiny_models()["llama"]()
    layers = model.model.layers
    layers.append(tiny_models()["llama"]().model.layers[1])
    model.config.num_hidden_layers = 3
    residence = residence_of(model, discover(model))
    model.model.layers = nn.ModuleList([layers[1], layers[0], layers[2]])
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM: runs its blocks in the order 1, 0, 2; eckart needs each"):
        open_stream(model, residence, [IDS])


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (1, 2, 0, 3), (1, 0, 2, 3), (0, 1, 3)])
def test_forms_are_found_and_undone(axes: tuple[int, ...]) -> None:
    """States of windows 3, positions 11, two streams of width 5, arranged in any way."""

    def states(ids: Tensor) -> Tensor:
        windows, length = ids.shape
        sizes = (windows, length, 2, 5)
        order = {axis: torch.arange(sizes[axis]) for axis in range(4)}
        whole = order[0][:, None, None, None] * 1000 + order[1][:, None, None] * 50 + order[2][:, None] * 7 + order[3]
        return whole[:, :, 0].permute(0, 1, 2) if axes == (0, 1, 3) else whole.permute(axes)

    form = form_of(IDS, states, "Model")
    native = states(IDS)
    plain = form.plain(native)
    assert plain.shape == (3, 11, 5 if axes == (0, 1, 3) else 10)
    assert torch.equal(plain[:, :, 0], torch.arange(3)[:, None] * 1000 + torch.arange(11) * 50)
    assert torch.equal(form.native(plain), native)
    assert form.is_plain == (axes == (0, 1, 3))


def test_states_without_windows_or_positions_are_refused() -> None:
    with pytest.raises(ModelError, match=r"^Model: its hidden states are \[33, 4\] for token ids \[3, 11\]"):
        form_of(IDS, lambda ids: torch.zeros(ids.numel(), 4), "Model")
    with pytest.raises(ModelError, match=r"^Model: runs none of its blocks on token ids alone"):
        form_of(IDS, lambda ids: None, "Model")
    assert Form().native(IDS) is IDS
