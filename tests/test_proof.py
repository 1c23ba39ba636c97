"""The walk proves itself: a model whose blocks are not what they seem is refused by name before any work."""

import pytest
import torch
from torch import nn

import eckart
from eckart.errors import ModelError
from eckart.model.discovery import discover
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, pass_blocks, prove, run_tail
from eckart.tiny import tiny_models, tiny_tokenizer

IDS = torch.randint(4, 99, (12,), generator=torch.Generator().manual_seed(0))
TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (4000,), generator=torch.Generator().manual_seed(0)))


def looped():
    """The stack runs twice."""
    model = tiny_models()["llama"]()
    real = model.model.forward

    def forward(*args, **options):
        options.pop("input_ids", None)
        first = real(*args, input_ids=IDS[None] if not args else None, **options)
        return real(inputs_embeds=first.last_hidden_state, use_cache=False)

    model.model.forward = forward
    return model


class Extra(nn.Module):
    """A block that returns more than states, in whatever container."""

    def __init__(self, block, wrap):
        super().__init__()
        self.block, self.wrap = block, wrap

    def forward(self, hidden_states, **options):
        out = self.block(hidden_states, **options)
        return self.wrap(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_families_prove_themselves_and_not_with_a_block_that_is_not_run(family):
    model = tiny_models()[family]()
    layout = discover(model)
    residence = residence_of(model, layout)
    prove(model, residence, IDS)
    blocks = model.get_submodule(layout.blocks)
    blocks[1].forward = blocks[0].forward
    with pytest.raises(ModelError, match="differ from its own"):
        prove(model, residence, IDS)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda s: (s, s.new_ones(3)), lambda s: [s, None], lambda s: (s,)])
def test_a_block_may_return_more_than_states(wrap):
    model = tiny_models()["llama"]()
    layers = model.model.layers
    for i, block in enumerate(layers):
        layers[i] = Extra(block, wrap)
        layers[i].register_forward_hook(lambda _m, _i, out: out[0])  # as the model's loop takes the first
    layout = discover(model)
    residence = residence_of(model, layout)
    expected = model(input_ids=IDS[None]).logits
    stream = pass_blocks(residence, open_stream(model, residence, [IDS[None]]))
    assert torch.allclose(run_tail(model, residence, stream, 0).logits, expected, atol=1e-5)


def test_a_stack_that_runs_twice_is_refused(tmp_path):
    model = looped()
    with pytest.raises(ModelError, match="LlamaForCausalLM: "):
        prove(model, residence_of(model, discover(model)), IDS)
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=12)
    with pytest.raises(ModelError, match="LlamaForCausalLM: "):
        eckart.compress(
            looped(), tokenizer=tiny_tokenizer(), recipe="svd-llm", keep=0.6, calibration=calibration,
            out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
