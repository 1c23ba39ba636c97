"""Shared bases: the best approximation of the side-by-side matrix, one tensor in memory, one copy on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart.errors import PlanError
from eckart.factorizers.svd_llm import SVDLLM
from eckart.ledger import parameters
from eckart.model.discovery import discover
from eckart.planning.decomposed import decompose
from eckart.plans.grouping import READERS, make_groups
from eckart.plans.plan import Plan, resolve
from eckart.statistics.sums import Gram, GroupStatistics, Statistics
from eckart.storages.pair import FactorizedLinear
from eckart.testing import tiny_model, tiny_models, tiny_tokenizer
from eckart.types import Entry, Group, Target

Q = "model.layers.{}.self_attn.q_proj"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_problem(outs, inner=10, tokens=40):
    """Members of one input size, each with its own inputs; (group, weights, inputs, statistics)."""
    group = Group(tuple(Target(f"b.{i}.up", i, "up", out, inner, False) for i, out in enumerate(outs)))
    weights = [normal(out, inner, seed=i) for i, out in enumerate(outs)]
    inputs = [normal(tokens, inner, seed=10 + i) @ normal(inner, inner, seed=20 + i) for i in range(len(outs))]
    members = []
    for x in inputs:
        gram = Gram(inner)
        gram.add_(x)
        members.append(Statistics(tokens, input_gram=gram))
    return group, weights, inputs, GroupStatistics(tuple(members))


@pytest.mark.parametrize("outs", [(4, 4), (10, 10), (3, 4, 5), (25, 25)])
def test_a_cut_is_the_best_of_its_rank_on_the_joined_inputs(outs):
    """The oracle: the truncated SVD of the side-by-side *outputs* on all inputs of the group (Eckart and Young)."""
    group, weights, inputs, statistics = group_problem(outs)
    made = SVDLLM(damping=0.0).decompose(group, weights, statistics)
    outputs = torch.cat(weights) @ torch.cat(inputs).T
    u, s, vt = torch.linalg.svd(outputs, full_matrices=False)
    for rank in range(1, group.full_rank + 1):
        factors = made.truncate(rank)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = factors.product() @ torch.cat(inputs).T
        torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-8 * float(s[0]))
        assert made.spectrum.error(rank) == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-7 * float(s[0]))
        assert [tuple(c.shape) for c in factors.coefficients] == [(out, rank) for out in outs]
        assert factors.basis.numel() + sum(c.numel() for c in factors.coefficients) == parameters(group, rank)


def test_a_group_of_one_is_svd_llm():
    group, weights, inputs, statistics = group_problem((6,))
    alone = SVDLLM(damping=0.0).decompose(group, weights, statistics).truncate(3).product()
    x = inputs[0]
    u, _, _ = torch.linalg.svd(weights[0] @ x.T, full_matrices=False)
    torch.testing.assert_close(alone, u[:, :3] @ u[:, :3].T @ weights[0], rtol=1e-9, atol=1e-9)


@pytest.fixture
def calibration(tmp_path):
    (tmp_path / "text.txt").write_text("A basis that two layers share is stored once and counted once. " * 60)
    return eckart.Calibration(data=str(tmp_path / "text.txt"), windows=6, length=24)


def three_blocks(heads=4):
    return tiny_model(
        "Llama", num_attention_heads=4, num_key_value_heads=heads, intermediate_size=64, num_hidden_layers=3
    )


def compress(model, calibration, recipe="basis-sharing", keep=0.7, **options):
    return eckart.compress(
        model, tokenizer=tiny_tokenizer(), recipe=recipe, keep=keep, calibration=calibration, **options
    )


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits


def test_one_tensor_in_memory(calibration):
    made = compress(three_blocks(), calibration)
    bases = [made.model.get_submodule(Q.format(i)).basis.weight for i in range(3)]
    assert bases[0] is bases[1]
    assert bases[2] is not bases[0]  # the last group is smaller
    o = [made.model.get_submodule(f"model.layers.{i}.self_attn.o_proj").basis.weight for i in (0, 1)]
    assert o[0] is not o[1]
    assert made.ledger.model_parameters_kept == sum(p.numel() for p in made.model.parameters())


def test_gradients_flow_to_the_one_tensor(calibration):
    """The gradient of the shared basis is the sum of those that two separate copies would get."""
    model = compress(three_blocks(), calibration).model.train()
    first, second = (model.get_submodule(Q.format(i)) for i in (0, 1))
    ids = torch.arange(4, 40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    together = first.basis.weight.grad.clone()
    assert second.basis.weight.grad is first.basis.weight.grad
    second.basis.weight = torch.nn.Parameter(first.basis.weight.detach().clone())
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    apart = [layer.basis.weight.grad for layer in (first, second)]
    torch.testing.assert_close(together, apart[0] + apart[1])
    assert all(float(gradient.norm()) > 0 for gradient in apart)


@pytest.mark.parametrize("recipe", ["basis-sharing", "d-rank"])
def test_saved_once_loads_bit_for_bit_and_survives_a_second_save(recipe, calibration, tmp_path):
    made = compress(three_blocks(), calibration, recipe, options={"grouping.size": 2}, keep=0.55, out=tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == made.ledger.model_parameters_kept
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    twice = sum(
        m.basis.weight.nbytes + m.coefficients.weight.nbytes
        for m in made.model.modules()
        if isinstance(m, FactorizedLinear)
    )
    once = 4 * made.ledger.target_parameters_kept
    assert made.ledger.model_bytes_kept < size < made.ledger.model_bytes_kept + (twice - once)
    loaded = eckart.load(tmp_path / "a")
    assert torch.equal(logits(loaded), logits(made.model))
    assert loaded.get_submodule(Q.format(0)).basis.weight is loaded.get_submodule(Q.format(1)).basis.weight
    eckart.save(loaded, tmp_path / "b", plan=made.plan)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    again = eckart.load(tmp_path / "b")
    assert torch.equal(logits(again), logits(made.model))
    assert again.get_submodule(Q.format(0)).basis.weight is again.get_submodule(Q.format(1)).basis.weight


@pytest.mark.parametrize("family", sorted(tiny_models()))
@pytest.mark.parametrize("size", [1, 2])
def test_d_rank_on_every_family(family, size, calibration, tmp_path):
    options = {"grouping.size": size, "allocator.guard": "code"}
    made = compress(tiny_models()[family](), calibration, "d-rank", options=options, keep=0.6, out=tmp_path / "small")
    assert made.ledger.keep <= 0.6
    assert torch.equal(logits(made.model), logits(eckart.load(tmp_path / "small")))
    assert made.ledger.model_parameters_kept == sum(p.numel() for p in made.model.parameters())
    assert max(len(entry.targets) for entry in made.plan.entries) == size


@pytest.mark.parametrize(("heads", "size"), [(4, 2), (2, 1)])
def test_d_rank_groups_by_two_unless_queries_are_grouped(heads, size, calibration):
    plan = eckart.plan(
        three_blocks(heads), tokenizer=tiny_tokenizer(), recipe="d-rank", keep=0.8, calibration=calibration
    )
    assert max(len(entry.targets) for entry in plan.entries) == size
    assert all(entry.details["energy_effective_rank"] >= 1 for entry in plan.entries)


def test_a_plan_with_groups_is_replayed_and_its_details_are_kept(calibration, tmp_path):
    options = {"grouping.size": 2}
    one = compress(three_blocks(), calibration, "d-rank", options=options, out=tmp_path / "one")
    two = compress(three_blocks(), calibration, "d-rank", plan=tmp_path / "one" / "plan.json")
    assert torch.equal(logits(one.model), logits(two.model))
    entries = json.loads((tmp_path / "one" / "plan.json").read_text())["entries"]
    assert {"energy_effective_rank", "rank_before_rebalancing"} <= entries[0]["details"].keys()
    assert [dict(e.details) for e in two.plan.entries] == [row["details"] for row in entries]
    with pytest.raises(eckart.errors.PlanError, match="details is 3, but it must be an object"):
        Plan.from_dict(
            {"format": "eckart-plan", "version": 1, "entries": [{"targets": ["a"], "rank": 1, "details": 3}]}
        )


def test_a_basis_may_be_shared_by_hand(calibration):
    """A plan that no recipe made: q of all three blocks, k of two that are not neighbours."""
    k = [f"model.layers.{i}.self_attn.k_proj" for i in (0, 2)]
    plan = Plan((Entry(tuple(Q.format(i) for i in range(3)), 5), Entry(tuple(k), 3)))
    model = compress(three_blocks(2), calibration, "svd-llm", plan=plan).model
    assert len({id(model.get_submodule(Q.format(i)).basis.weight) for i in range(3)}) == 1
    assert model.get_submodule(k[0]).basis.weight is model.get_submodule(k[1]).basis.weight


def test_equal_decompositions_serve_every_cut():
    """The group's spectrum is that of the stacked weight, whichever member comes first."""
    model = tiny_models()["llama"]()
    layout = discover(model)
    windows = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(0))
    groups = make_groups(layout.targets, 2, READERS)
    spectra = {
        order: decompose(model, layout, [Group(g.targets[::step]) for g in groups], SVDLLM(), windows)
        for order, step in (("there", 1), ("back", -1))
    }
    for group in groups:
        there, back = spectra["there"][group.name], spectra["back"][group.targets[-1].name]
        torch.testing.assert_close(there.spectrum.values, back.spectrum.values, rtol=1e-6, atol=1e-6)


def test_layers_of_unlike_inputs_share_no_basis():
    targets = [Target("a", 0, "a", 8, 8, False), Target("b", 0, "b", 8, 6, False)]
    with pytest.raises(PlanError, match=r"^a.*: the targets that share its basis have different input sizes\.$"):
        resolve(Plan((Entry(("a", "b"), 2),)), targets)
