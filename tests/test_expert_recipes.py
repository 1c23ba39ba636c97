"""Recipes on mixtures of experts, end to end: budgets, even and free ranks, every door, generation with the cache."""

import logging

import pytest
import torch
from mixtures import MIXTURES
from transformers import AutoModelForCausalLM

import eckart
from eckart import recipes
from eckart.errors import OptionError
from eckart.factorizers._each import decompose_each
from eckart.factorizers.svd_llm import SVDLLM
from eckart.model.discovery import discover
from eckart.model.experts import is_open
from eckart.portable.experts import stacks_in
from eckart.statistics import Gram, GroupStatistics, Statistics
from eckart.types import Group, Target

# What makes the costly ones cheap; the recipes are else as they are.
QUICK = {
    "lc-svd": {
        "allocator.candidates": 3, "allocator.windows": 1, "allocator.held_out": 1, "block_collaborative.steps": 4,
    },
    "duo-svd": {"allocator.shares": (0.4, 0.8, 1.0), "allocator.windows": 1, "allocator.length": 8},
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(
        "Sphinx of black quartz, judge my vow. How vexingly quick daft zebras jump! " * 9
    )
    return eckart.Calibration(str(tmp_path / "text.txt"), 4, 24)


def compress(family, recipe, text, tokenizer, **options):
    chosen = {**QUICK.get(recipe, {}), **options.pop("options", {})}
    arguments = {"keep": 0.6, "calibration": text, "tokenizer": tokenizer, "options": chosen, **options}
    return eckart.compress(MIXTURES[family](), recipe=recipe, **arguments)


def is_exact(made):
    """What is stored is what the ledger says, and within the budget."""
    assert sum(p.numel() for p in made.model.parameters()) == made.ledger.model_parameters_kept
    assert made.ledger.keep <= 0.6


ALL = [(family, recipe) for family in MIXTURES for recipe in ("svd-llm", "eckart")]
ALL += [("qwen3-moe", "d-rank"), ("gpt-oss", "d-rank"), ("qwen3-moe", "duo-svd"), ("mixtral", "lc-svd")]


@pytest.mark.parametrize(("family", "recipe"), ALL)
def test_end_to_end(family, recipe, text, tokenizer, tmp_path, ids):
    made = compress(family, recipe, text, tokenizer, out=tmp_path / "out")
    is_exact(made)
    assert list(stacks_in(made.model))
    assert all(len(set(stack.ranks)) == 1 for _, stack in stacks_in(made.model))
    entries = [entry for entry in made.plan.entries if ".experts." in entry.name]
    assert all(entry.own_bases and len(entry.targets) == 4 for entry in entries)
    loaded, native = eckart.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected = made.model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert torch.equal(native(input_ids=ids).logits, expected)
    assert torch.equal(
        loaded.generate(ids[:1], use_cache=True, **options), native.generate(ids[:1], use_cache=False, **options)
    )
    again = eckart.compress(MIXTURES[family](), plan=made.plan, recipe=recipe, calibration=text, tokenizer=tokenizer,
                            options=QUICK.get(recipe, {}))  # fmt: skip
    assert [(e.targets, e.rank) for e in again.plan.entries] == [(e.targets, e.rank) for e in made.plan.entries]


def test_free_ranks_differ_within_a_layer_and_cost_no_more(text, tokenizer):
    made = compress("qwen3-moe", "eckart", text, tokenizer, options={"experts.ranks": "free"})
    is_exact(made)
    assert any(len(set(stack.ranks)) > 1 for _, stack in stacks_in(made.model))
    even = compress("qwen3-moe", "eckart", text, tokenizer)
    assert made.plan.reached["predicted_kl"] <= even.plan.reached["predicted_kl"] * 1.05


def test_the_water_level_spares_a_super_expert(text, tokenizer):
    """One expert of one layer is made to write twelve times as much as the others."""
    model = MIXTURES["qwen3-moe"]()
    model.model.layers[1].mlp.experts.down_proj.data[1] *= 12
    made = eckart.compress(
        model, recipe="eckart", keep=0.5, calibration=text, tokenizer=tokenizer, options={"experts.ranks": "free"}
    )
    stack = made.model.model.layers[1].mlp.experts.gate_up_proj
    ranks = [rank or min(stack.out_features, stack.in_features) for rank in stack.ranks]
    assert ranks[1] == max(ranks)
    assert ranks[1] > 1.5 * sorted(ranks)[1]


def test_a_plan_and_spectra_leave_the_model_as_it_was(text, tokenizer):
    model = MIXTURES["qwen3-moe"]()
    before = dict(model.named_parameters())
    plan = eckart.plan(model, recipe="svd-llm", keep=0.6, calibration=text, tokenizer=tokenizer)
    spectra = eckart.spectra(model, recipe="svd-llm", calibration=text, tokenizer=tokenizer)
    assert {entry.name for entry in plan.entries} == {spectrum.group.name for spectrum in spectra}
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert not any(is_open(module) for module in model.modules())


def test_a_run_that_fails_leaves_no_stack_open(text, tokenizer, monkeypatch):
    model = MIXTURES["qwen3-moe"]()
    monkeypatch.setattr("eckart.pipeline.carry_out", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eckart.compress(model, recipe="svd-llm", calibration=text, tokenizer=tokenizer)
    assert not any(is_open(module) for module in model.modules())


def test_the_rarest_expert_is_named_with_its_tokens(text, tokenizer, caplog):
    with caplog.at_level(logging.INFO, "eckart"):
        made = compress("qwen3-moe", "svd-llm", text, tokenizer)
    facts = made.provenance["experts"]
    assert facts["tokens"] > 0
    assert f"the rarest expert, {facts['rarest']}, saw {facts['tokens']} tokens; calibrate on more text" in caplog.text
    said = [record for record in caplog.records if "the rarest expert" in record.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING]


def test_a_group_of_experts_loses_what_its_members_lose():
    """The spectrum of an even group, against each member's cut in its own metric."""
    targets = tuple(Target(f"b.0.e.{i}", 0, "e", 7, 9, False, i) for i in range(3))
    weights, grams = [torch.randn(7, 9) for _ in targets], [Gram(9) for _ in targets]
    for gram in grams:
        gram.add_(torch.randn(40, 9) * torch.rand(9))
    collected = GroupStatistics(tuple(Statistics(tokens=40, input_gram=gram) for gram in grams))
    group = Group(targets, own_bases=True)
    made = decompose_each(SVDLLM(), group, weights, collected)
    assert (group.parameters, group.full_rank, group.matrices) == (3 * 63, 7, 3)
    for rank in (1, 4, 7):
        lost = 0.0
        for (members, factors), weight, gram in zip(made.cuts(rank), weights, grams, strict=True):
            assert len(members.targets) == 1
            error = (weight - factors.product()).double()
            lost += float((error @ gram.matrix @ error.T).trace())
        assert made.spectrum.error(rank) ** 2 == pytest.approx(lost, rel=1e-3, abs=1e-3)
    with pytest.raises(TypeError, match="its members have a basis each"):
        made.truncate(2)


def test_groups_of_a_recipe_do_not_mix_experts_with_others_or_layers():
    layout = discover(MIXTURES["qwen3-moe"]())
    groups = recipes.find("basis-sharing").groups(layout.targets)
    assert sum(len(group.targets) for group in groups) == len(layout.targets)
    for group in groups:
        if group.of_experts:
            assert group.own_bases
            assert len({(t.block, t.kind) for t in group.targets}) == 1
        else:
            assert not group.own_bases
    free = recipes.find("svd-llm", {"experts.ranks": "free"}).groups(layout.targets)
    assert all(len(group.targets) == 1 and not group.own_bases for group in free)


def test_options_of_experts_are_checked():
    with pytest.raises(OptionError, match=r"experts\.prior is -1, but must not be negative"):
        recipes.find("svd-llm", {"experts.prior": -1})
    with pytest.raises(OptionError, match=r"experts\.ranks"):
        recipes.find("svd-llm", {"experts.ranks": "odd"})
    assert recipes.find("svd-llm").to_dict()["experts"] == {"ranks": "even", "prior": 0.1}
