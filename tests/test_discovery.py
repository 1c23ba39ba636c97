"""Blocks and targets by structure, and an account of everything else."""

import pytest
import torch
from torch import nn

import eckart
from eckart.errors import ModelError
from eckart.model.discovery import check_finite, discover, skipped_by_reason
from eckart.testing import tiny_models, tiny_tokenizer

KINDS = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
    "gpt-neox": {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(KINDS))
def test_kinds(family):
    layout = discover(tiny_models()[family]())
    assert {target.kind for target in layout.targets} == KINDS[family]
    assert {target.block for target in layout.targets} == {0, 1}


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_every_parameter_is_a_target_or_skipped_with_a_reason(family):
    model = tiny_models()[family]()
    layout = discover(model)
    skipped = sum(skipped.parameters for skipped in layout.skipped)
    assert layout.target_parameters + skipped == sum(p.numel() for p in model.parameters()) == layout.parameters
    assert all(skipped.reason for skipped in layout.skipped)
    assert sum(skipped_by_reason(layout).values()) == skipped


def test_conv1d_is_seen_as_out_by_in():
    target = next(t for t in discover(tiny_models()["gpt2"]()).targets if t.kind == "attn.c_attn")
    assert (target.out_features, target.in_features, target.has_bias) == (96, 32, True)


def test_tied_head_is_skipped_and_said_to_be_tied():
    reasons = skipped_by_reason(discover(tiny_models()["llama-tied"]()))
    assert "embedding, tied with lm_head.weight" in reasons
    untied = skipped_by_reason(discover(tiny_models()["llama"]()))
    assert "linear outside the decoder blocks" in untied


def test_include_and_exclude():
    model = tiny_models()["llama"]()
    only = discover(model, include=["mlp.*"], exclude=["*.layers.1.*"])
    assert [t.name for t in only.targets] == [f"model.layers.0.mlp.{k}_proj" for k in ("gate", "up", "down")]
    reasons = skipped_by_reason(only)
    assert "matches no --include pattern" in reasons
    assert "matches --exclude *.layers.1.*" in reasons
    with pytest.raises(ModelError, match=r"no linear layer to compress in 'model\.layers' \(matches no --include"):
        discover(model, include=["*.w1"])


def test_fused_experts_are_reported_with_their_share():
    model = tiny_models()["llama"]()
    model.model.layers[0].experts = nn.ParameterList([nn.Parameter(torch.zeros(2, 4, 4))])
    reasons = skipped_by_reason(discover(model))
    assert reasons["fused 3-D parameter of ParameterList, which is not used as eckart knows experts"] == 32


def test_models_without_blocks_or_linears():
    with pytest.raises(ModelError, match="no list of repeated decoder blocks"):
        discover(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="no linear layer to compress"):
        discover(nn.Sequential(nn.ModuleList([nn.LayerNorm(4)])))


def test_the_largest_list_below_the_decoder_is_taken():
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
            self.text = nn.Module()
            self.text.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(2)])

        def get_decoder(self):
            return self.text

    assert discover(TwoTowers()).blocks == "text.layers"


def test_a_nan_names_its_layer():
    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj: 1 of 2048 weights are NaN"):
        check_finite(model, discover(model).targets)


def test_a_factorised_model_is_not_factorised_again(make):
    with pytest.raises(
        ModelError, match=r"^model\.layers\.0\.self_attn\.q_proj: is factorised already; compress the original model"
    ):
        eckart.compress(make("llama"), tokenizer=tiny_tokenizer(), recipe="svd", keep=0.5)


def test_blocks_that_a_model_leaves_out_stay_dense(tmp_path, caplog):
    model = tiny_models()["llama"]()
    model.config.num_hidden_layers = 1  # of the two that it has
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 100)
    text = eckart.Calibration(str(tmp_path / "text.txt"), windows=2, length=16)
    made = eckart.compress(model, tokenizer=tiny_tokenizer(), recipe="svd-llm", keep=0.5, calibration=text)
    assert {target.block for target in made.layout.targets} == {0}
    assert "stays dense, since no token of the calibration reached it: model.layers.1.self_attn.q_proj" in caplog.text


def test_a_model_that_runs_a_block_twice_is_named(tmp_path):
    model = tiny_models()["llama"]()
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 3
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 100)
    text = eckart.Calibration(str(tmp_path / "text.txt"), windows=2, length=16)
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM: "):
        eckart.compress(model, tokenizer=tiny_tokenizer(), recipe="svd-llm", keep=0.5, calibration=text)
