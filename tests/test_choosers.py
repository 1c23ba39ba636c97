"""Routers and gates stay dense by structure, with the reason in the account; `include` brings them back."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import eckart
from eckart.model.choosers import choosers
from eckart.model.discovery import discover
from eckart.tiny import tiny_models, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import families

FAMILIES = {
    "afmoe": {"mlp.router.gate"},
    "dbrx": {"ffn.router.layer"},
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "jetmoe": {"mlp.router.layer", "self_attention.experts.router.layer"},
    "longcat_flash": {"mlp.router.classifier"},
    "zaya": {
        "mlp.gate.down_proj",
        "mlp.gate.router_mlp.fc1",
        "mlp.gate.router_mlp.fc2",
        "mlp.gate.router_mlp.out_proj",
    },
    "qwen3_next": {"linear_attn.in_proj_ba"},
    "qwen3_5_text": {"linear_attn.in_proj_a", "linear_attn.in_proj_b"},
    "olmo_hybrid": {"linear_attn.a_proj", "linear_attn.b_proj"},
    "doge": {"self_attn.dt_proj"},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_chooses_stays_dense(family: str) -> None:
    model = families.build(family)
    layout = discover(model)
    left = {
        s.name.removeprefix(f"{layout.blocks}.").partition(".")[2].removesuffix(".weight"): s.reason
        for s in layout.skipped
        if "chooses among" in s.reason or "no wider than" in s.reason
    }
    assert set(left) == FAMILIES[family]
    named = discover(model, include=sorted(left))
    assert {target.kind for target in named.targets} == set(left)


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_ordinary_families_have_none(family: str) -> None:
    assert not any("no wider" in s.reason or "chooses" in s.reason for s in discover(tiny_models()[family]()).skipped)


class Numbers:
    """A configuration."""

    hidden_size = 64

    def __init__(self, **numbers: object) -> None:
        self.numbers = numbers

    def to_dict(self) -> dict[str, object]:
        return self.numbers


def linears(**shapes: tuple[int, int]) -> nn.Module:
    """Linear layers `[out, in]` by their name."""
    block = nn.Module()
    for name, (out, into) in shapes.items():
        block.add_module(name, nn.Linear(into, out, bias=False))
    return block


def test_what_is_as_wide_as_there_are_experts_by_chance_is_none() -> None:
    """512 experts, and 512 keys, values and inner units."""
    block = nn.Module()
    block.attention = linears(q=(64, 64), k=(32, 64), v=(32, 64), o=(64, 64))
    block.mlp = nn.Module()
    block.mlp.gate = nn.Linear(64, 32)
    block.mlp.shared = linears(gate=(32, 64), up=(32, 64), down=(64, 32))
    block.mlp.experts = nn.Module()
    block.mlp.experts.up = nn.Parameter(torch.zeros(32, 8, 64))
    assert set(choosers(Numbers(num_experts=32, num_attention_heads=4), block)) == {"mlp.gate"}
    assert choosers(Numbers(num_experts_per_tok=32, num_shared_experts=32, head_dim=64), block) == {}
    assert choosers(None, block) == {}


def test_one_number_or_two_for_each_head() -> None:
    block = linears(q=(64, 64), beta=(8, 64), decay=(8, 64), both=(16, 64), wide=(17, 64))
    assert set(choosers(Numbers(linear_num_value_heads=8), block)) == {"beta", "decay", "both"}
    assert set(choosers(Numbers(inner={"num_heads": 17}), block)) == {"beta", "decay", "both", "wide"}


def test_a_router_is_kept_when_its_model_is_compressed(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)
    made = eckart.compress(
        families.build("afmoe"), tokenizer=tiny_tokenizer(), recipe="svd-llm", keep=0.7, calibration=calibration
    )
    assert type(made.model.get_submodule("model.layers.1.mlp.router.gate")) is nn.Linear
    (reason,) = [s.reason for s in made.layout.skipped if s.name == "model.layers.1.mlp.router.gate.weight"]
    assert reason == "chooses among 4 experts: cut, it would send tokens elsewhere"
