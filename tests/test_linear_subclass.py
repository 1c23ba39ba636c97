"""A subclass of `nn.Linear` is a target if it computes what `nn.Linear` computes, and only then."""

import pytest
import torch
from torch import nn

import eckart
from eckart.model.discovery import discover
from eckart.portable.linear import is_linear
from eckart.testing import tiny_model, tiny_models


class ByHand(nn.Linear):
    """As Falcon's: the same product, written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Gated(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Adapted(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down = nn.Linear(sizes[0], 2)


class WithTable(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(1))


class Surrounded(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not here")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(ByHand, True), (Scaled, False), (Gated, False), (Adapted, False), (WithTable, False), (Surrounded, False)],
)
def test_by_what_it_computes(kind, expected):
    state = torch.get_rng_state()
    with torch.device("meta"):
        module = kind(6, 4)
    assert is_linear(module) == expected
    assert torch.equal(torch.get_rng_state(), state)  # trying draws nothing


def test_falcon_is_compressed_and_loads(tmp_path, tokenizer, ids):
    model = tiny_model("Falcon", num_attention_heads=4, alibi=False, new_decoder_architecture=False)
    assert len(discover(model).targets) == 8
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)
    made = eckart.compress(
        model, tokenizer=tokenizer, recipe="svd-llm", keep=0.6, calibration=calibration, out=tmp_path / "out"
    )
    assert torch.equal(eckart.load(tmp_path / "out")(ids).logits, made.model(ids).logits)


def test_a_scaled_one_is_left_alone():
    model = tiny_models()["llama"]()
    layer = Scaled(32, 32, bias=False)
    model.model.layers[0].self_attn.q_proj = layer
    layout = discover(model)
    assert "model.layers.0.self_attn.q_proj" not in {target.name for target in layout.targets}
    assert any(skipped.name == "model.layers.0.self_attn.q_proj.weight" for skipped in layout.skipped)
