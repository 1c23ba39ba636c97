"""Experts as targets: how their matrices are found, which way they lie, what a model computes while they are open."""

from typing import ClassVar

import pytest
import torch
from mixtures import MIXTURES
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from eckart.errors import ModelError
from eckart.model.discovery import check_finite, discover, skipped_by_reason
from eckart.model.experts import dense_weight, is_open, open_, opened
from eckart.portable.experts import stack_names, transposed

SHAPES = {  # (out, in) of the first stack, and of the second
    "mixtral": ((96, 32), (32, 48)), "qwen3-moe": ((32, 32), (32, 16)), "olmoe": ((32, 32), (32, 16)),
    "gpt-oss": ((48, 32), (32, 24)), "deepseek-v3": ((32, 32), (32, 16)),
}  # fmt: skip


def experts_of(layout, kind=""):
    return [t for t in layout.targets if t.expert is not None and t.kind.endswith(kind)]


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_two_targets_and_everything_is_accounted_for(family):
    model = MIXTURES[family]()
    layout = discover(model)
    for kind, shape in zip(("gate_up_proj", "down_proj"), SHAPES[family], strict=True):
        targets = experts_of(layout, kind)
        assert [t.expert for t in targets if t.block == 1] == [0, 1, 2, 3]
        assert {(t.out_features, t.in_features) for t in targets} == {shape}
        assert {t.kind for t in targets} == {f"mlp.experts.{kind}"}
        assert targets[-1].name == f"model.layers.1.mlp.experts.{kind}.3"
        assert targets[-1].place == f"mlp.experts.{kind}.3"
    assert layout.target_parameters + sum(s.parameters for s in layout.skipped) == layout.parameters


@pytest.mark.parametrize("family", MIXTURES)
def test_the_same_is_found_without_weights_and_with_open_stacks(family):
    model = MIXTURES[family]()
    layout = discover(model)
    with torch.device("meta"):
        assert discover(type(model)(model.config)) == layout
    with opened(model, layout.targets):
        assert discover(model) == layout


@pytest.mark.parametrize("family", MIXTURES)
def test_an_open_model_computes_the_same_and_closes_to_the_same_parameters(family, ids):
    model = MIXTURES[family]()
    layout, before = discover(model), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with opened(model, layout.targets):
            assert model.get_submodule(experts_of(layout)[0].name).weight.shape == SHAPES[family][0]
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            with opened(model, layout.targets):  # open already: left open by the inner one
                pass
            assert is_open(model.model.layers[1].mlp.experts)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[name] is parameter for name, parameter in before.items())
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_weight_of_an_expert_is_the_matrix_that_it_multiplies_by(family):
    """By one-hot inputs: row i of what comes out is column i of the weight, plus the bias."""
    model = MIXTURES[family]()
    layout = discover(model)
    experts = model.model.layers[1].mlp.experts
    target = experts_of(layout, "gate_up_proj")[-1]
    seen = []
    experts._apply_gate = lambda y: seen.append(y) or y[:, : target.out_features // 2]
    with torch.no_grad():
        one_hot = torch.eye(target.in_features)
        where = torch.full((len(one_hot), 1), 3)
        experts.config._experts_implementation = "batched_mm"  # which asks `_apply_gate`
        experts(one_hot, where, torch.ones(len(one_hot), 1))
    bias = getattr(experts, "gate_up_proj_bias", torch.zeros(4, 1))[3]
    torch.testing.assert_close(seen[0].T, dense_weight(model, target) + bias[:, None])


def test_patterns_match_stacks_and_single_experts():
    model = MIXTURES["qwen3-moe"]()
    only = discover(model, include=["*.experts.down_proj"], exclude=["*.experts.*.2", "*.layers.0.*"])
    assert [t.name for t in only.targets] == [f"model.layers.1.mlp.experts.down_proj.{e}" for e in (0, 1, 3)]
    assert skipped_by_reason(only)["matches --exclude *.experts.*.2"] == 2 * 32 * 16
    assert only.target_parameters + sum(s.parameters for s in only.skipped) == only.parameters
    assert not experts_of(discover(model, exclude=["mlp.experts.*"]))


def test_the_expert_whose_weight_is_not_finite_is_named():
    model = MIXTURES["gpt-oss"]()
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj\.2: 1 of 768 weights are NaN"):
        check_finite(model, discover(model).targets)


class Square(nn.Module):
    """Experts whose stacks are square, so that only the code tells which way they lie; 4 inside, 4 outside."""

    config: ClassVar = None

    def __init__(self, config=None):
        super().__init__()
        self.num_experts = 3
        self.up_proj = nn.Parameter(torch.randn(3, 4, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))
        self.act_fn = torch.tanh

    def forward(self, hidden_states, top_k_index, top_k_weights):
        result = torch.zeros_like(hidden_states)
        for e in top_k_index.unique():
            token, at = torch.where(top_k_index == e)
            y = self.act_fn(self.first(hidden_states[token], e))
            result.index_add_(0, token, self.second(y, e) * top_k_weights[token, at, None])
        return result

    def first(self, x, e):
        return nn.functional.linear(x, self.up_proj[e])

    def second(self, y, e):
        return y @ self.down_proj[e]


@use_experts_implementation(has_gate=False)
class Crossed(Square):
    """Says that nothing is transposed, but its second product is with a transposed stack."""


@use_experts_implementation(has_gate=False)
class Scaled(Square):
    """Does with its stack what is no product with its matrices."""

    def first(self, x, e):
        return x @ (self.up_proj[e] / self.up_proj[e].norm())


@use_experts_implementation(has_gate=False)
class Shifted(Square):
    """Has something of its own between the products."""

    def second(self, y, e):
        return (y + 1) @ self.down_proj[e]


def test_which_way_a_square_stack_lies_is_found_by_how_it_is_used():
    module = Crossed(None)
    assert stack_names(module) == ("up_proj", "down_proj")
    assert transposed(module) == {"up_proj": False, "down_proj": True}
    x, where, gates = torch.randn(5, 4), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]]), torch.rand(5, 2)
    with torch.no_grad():
        expected = Square.forward(module, x, where, gates)
        open_(module, "experts", prove=True)
        torch.testing.assert_close(module(x, where, gates), expected)


def test_what_is_no_plain_product_stays_dense():
    assert transposed(Scaled(None)) == {}
    block = nn.Module()
    block.mlp, block.linear = Scaled(None), nn.Linear(4, 4)
    reasons = skipped_by_reason(discover(nn.Sequential(nn.ModuleList([block]))))
    assert reasons["fused 3-D parameter of Scaled, which is not used as eckart knows experts"] == 96


def test_experts_that_do_something_of_their_own_are_refused_when_they_are_opened():
    block = nn.Module()
    block.mlp = Shifted(None)
    model = nn.Sequential(nn.ModuleList([block]))
    said = r"0\.0\.mlp: a Shifted computes something else than its experts one by one"
    with pytest.raises(ModelError, match=said), opened(model, discover(model).targets):
        pass
    assert not is_open(block.mlp)
    assert isinstance(block.mlp.down_proj, nn.Parameter)
