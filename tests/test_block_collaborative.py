"""The sweep over blocks on a tiny model that was trained a little, so that its blocks do something."""

import logging
from dataclasses import replace

import pytest
import torch

from eckart.errors import DataError, NumericalError, OptionError
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, walk
from eckart.plans.plan import Plan
from eckart.portable.linear import weight_view
from eckart.refiners._block_factors import split_windows
from eckart.refiners.base import Refinement
from eckart.refiners.block_collaborative import BlockCollaborative
from eckart.testing import tiny_model, tiny_models
from eckart.types import Entry

LENGTH = 24


def text_windows(count, seed=0):
    """Windows of a language with structure: each token follows from the last two, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (count, LENGTH), generator=generator)
    surprise = torch.rand(count, LENGTH, generator=generator) < 0.15
    for at in range(2, LENGTH):
        follow = (3 * ids[:, at - 1] + 5 * ids[:, at - 2]) % 40 + 3
        ids[:, at] = torch.where(surprise[:, at], ids[:, at], follow)
    return ids


@pytest.fixture(scope="module")
def trained_state():
    """Weights of a tiny model after 150 steps of Adam."""
    model = make_model().train()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        batch = text_windows(16, seed=100 + step)
        adam.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
    return model.state_dict()


def make_model(layers=3, dtype=torch.float32):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    return tiny_model("Llama", **options, num_hidden_layers=layers).to(dtype)


def compressed(model, rank=8, dense=("k_proj",), count=20, **more):
    """A refinement of `model` with plain SVD factors at one rank everywhere, `dense` kinds left alone."""
    layout = discover(model)
    entries = tuple(Entry((t.name,), rank) for t in layout.targets if not t.kind.endswith(tuple(dense)))
    weights = {entry.name: weight_view(model.get_submodule(entry.name)).clone() for entry in entries}
    for entry in entries:
        u, s, vt = torch.linalg.svd(weights[entry.name], full_matrices=False)
        factorize_(model, entry.name, vt[:rank], u[:, :rank] * s[:rank])
    return Refinement(model, layout, Plan(entries), weights, text_windows(count), **more)


@pytest.fixture
def work(trained_state):
    model = make_model()
    model.load_state_dict(trained_state)
    return compressed(model)


def tied_error(work):
    """Largest distance of the basis from `Q^T W` and of `Q^T Q` from the identity, outside rolled back blocks."""
    worst, blocks = 0.0, {target.name: target.block for target in work.layout.targets}
    for name, weight in work.dense_weights.items():
        if work.notes[blocks[name]]["rolled_back"]:
            continue
        layer = work.model.get_submodule(name)
        q = layer.coefficients.weight.detach()
        worst = max(worst, float((layer.basis.weight.detach() - q.T @ weight).abs().max()))
        worst = max(worst, float((q.T @ q - torch.eye(q.shape[1])).abs().max()))
    return worst


@pytest.mark.parametrize("target", ["anchored", "same_input"])
@pytest.mark.parametrize("form", ["svd", "grassmann", "free"])
def test_every_block_of_a_trained_model_gains_on_held_out_windows_or_says_so(work, form, target, caplog):
    """The notes are checked against errors that are measured here, from the model as it was left."""
    with caplog.at_level(logging.WARNING):
        BlockCollaborative(form=form, target=target, steps=40, rate=3e-3, batch=6, free_rate=3e-3).refine_(work)
    assert len(work.notes) == 3
    for index, notes in enumerate(work.notes):
        if notes["rolled_back"]:
            assert f"block {index}: no gain" in caplog.text
        else:
            assert notes["reached"] < min(notes["layer_wise"], notes["as_found"])
        if form == "free":
            assert notes["reached"] <= notes["tied"]
    assert sum(not notes["rolled_back"] for notes in work.notes) >= 2
    measured = block_errors(work, target)
    assert measured == pytest.approx([notes["reached"] for notes in work.notes], rel=1e-4)
    if form != "free":
        assert tied_error(work) < 1e-5


def block_errors(work, target, dense=None, ids=None):
    """Held-out output error of every block, by running whole dense and compressed blocks side by side."""
    dense = make_model() if dense is None else dense
    source = dict(work.model.state_dict())
    for name, weight in work.dense_weights.items():
        source[f"{name}.weight"] = weight
    dense.load_state_dict({k: source[k] for k in dense.state_dict()})
    ids = work.windows[-2:] if ids is None else ids  # a tenth of twenty
    with torch.no_grad():
        truth = dense(input_ids=ids, output_hidden_states=True, use_cache=False)
        result = []
        residence = residence_of(work.model, work.layout)
        stream = open_stream(work.model, residence, [ids])
        for at in walk(residence, stream):
            output, original = at.run(stream, 0), dense.model.layers[at.index]
            if target == "same_input":
                goal = at.run(stream, 0, block=original)
            elif at.index < len(residence) - 1:
                goal = truth.hidden_states[at.index + 1]
            else:  # the last hidden state of the model's own output is normalised
                goal = at.run(stream, 0, truth.hidden_states[at.index], original)
            result.append(float((output - goal).square().sum() / goal.square().sum()))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("rank", [8, 12])
def test_the_grassmann_form_reaches_the_loss_of_the_decomposed_form(rank):
    """The same set of factors and the same start, so the same loss; both are run to convergence on all windows.

    Windows that come twice are both trained on and held out. A block that gained nothing is left at its start.
    """
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "hidden_size": 16}

    def error(form, **options):
        dense, model = (tiny_model("Llama", **sizes, num_hidden_layers=1).double() for _ in range(2))
        work = compressed(model, rank=rank, dense=("k_proj", "v_proj"), count=4)
        twice = replace(work, windows=torch.cat([work.windows, work.windows]))
        refiner = BlockCollaborative(form=form, batch=4, held_out=0.5, check_every=50, stop=0.0, **options)
        refiner.refine_(twice)
        (notes,) = work.notes
        assert (notes["steps"], notes["rolled_back"]) == (options["steps"], options["steps"] == 1)
        return block_errors(work, "anchored", dense, work.windows)[0]

    starts, reached = {}, {}
    for form, rate, steps in (("svd", 0.1, 500), ("grassmann", 0.01, 300)):
        starts[form] = error(form, rate=1e-30, steps=1)
        reached[form] = error(form, rate=rate, steps=steps)
    assert starts["svd"] == pytest.approx(starts["grassmann"], rel=1e-9)
    assert reached["svd"] < 0.7 * starts["svd"]
    assert reached["grassmann"] == pytest.approx(reached["svd"], rel=0.01)


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_every_family(family):
    work = compressed(tiny_models()[family](), count=6)
    BlockCollaborative(steps=5, batch=3).refine_(work)
    assert tied_error(work) < 1e-4
    assert all("reached" in notes for notes in work.notes)


def test_the_refreshed_start_reads_what_the_compressed_block_feeds_it(work):
    """With and without refreshed Grams the first stage starts alike and the last one does not."""
    down = {}
    for refresh in (True, False):
        options = BlockCollaborative(steps=1, rate=1e-30, batch=6, refresh=refresh)
        options.refine_(work)
        block = work.model.model.layers[0]
        down[refresh] = (block.self_attn.q_proj.weight.detach().clone(), block.mlp.down_proj.weight.detach().clone())
    assert torch.allclose(down[True][0], down[False][0], atol=1e-5)
    assert not torch.allclose(down[True][1], down[False][1], atol=1e-3)


def test_a_rate_that_ruins_the_block_is_rolled_back_and_said_so(work, caplog):
    with caplog.at_level(logging.WARNING):
        BlockCollaborative(steps=3, rate=50.0, batch=6, check_every=1).refine_(work)
    assert all(notes["rolled_back"] for notes in work.notes)
    assert caplog.text.count("no gain on held-out windows") == 3
    assert block_errors(work, "anchored") == pytest.approx([n["layer_wise"] for n in work.notes], rel=1e-3)


def test_the_stop_rule_ends_a_descent_that_no_longer_gains(work):
    BlockCollaborative(steps=200, rate=1e-9, batch=6, check_every=1).refine_(work)
    assert [notes["steps"] for notes in work.notes] == [5, 5, 5]


def test_bad_options_and_too_few_windows(work):
    for options, text in (
        ({"steps": 0}, "block_collaborative.steps is 0, but must be positive."),
        ({"held_out": 1.0}, "block_collaborative.held_out is 1, but must lie in (0, 1)."),
        ({"stop": -0.1}, "block_collaborative.stop is -0.1, but must lie in [0, 1)."),
    ):
        with pytest.raises(OptionError) as caught:
            BlockCollaborative(**options)
        assert str(caught.value) == text
    with pytest.raises(DataError, match="1 windows, but a share must be held out"):
        split_windows(work.windows[:1], 4, 0.1)


def test_infinite_activations_stop_with_the_number_of_the_block(work):
    with torch.no_grad():
        work.model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match="block 1: "):
        BlockCollaborative(steps=2, batch=6).refine_(work)


def fit_to(work, windows):
    """Put whitened factors made from `windows` alone in the place of those that are there, as the dense model runs."""
    dense = make_model()
    dense.load_state_dict({**{k: v for k, v in work.model.state_dict().items() if k in dense.state_dict()}, **{
        f"{name}.weight": weight for name, weight in work.dense_weights.items()
    }})  # fmt: skip
    for name, weight in work.dense_weights.items():
        seen = []
        handle = dense.get_submodule(name).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args))
        with torch.no_grad():
            dense(input_ids=windows, use_cache=False)
        handle.remove()
        x = seen[0][0].flatten(0, 1)
        q = torch.linalg.svd(weight @ x.T, full_matrices=False)[0][:, : work.model.get_submodule(name).rank]
        work.model.get_submodule(name).basis.weight.data.copy_(q.T @ weight)
        work.model.get_submodule(name).coefficients.weight.data.copy_(q)


def test_factors_that_have_seen_what_judges_them_do_not_win(work):
    """With no other text, what was made from all windows is no rival: it would win on what it has seen."""
    fit_to(work, work.windows[-2:])
    found = {name: work.model.get_submodule(name).coefficients.weight.clone() for name in work.dense_weights}
    BlockCollaborative(steps=2, rate=1e-30, batch=6).refine_(work)
    cheated = [notes for notes in work.notes if notes["as_found"] < notes["layer_wise"]]
    assert cheated
    for notes in cheated:
        assert notes["reached"] == pytest.approx(notes["layer_wise"])
    changed = [not torch.equal(work.model.get_submodule(n).coefficients.weight, q) for n, q in found.items()]
    assert all(changed)


@pytest.mark.parametrize("start", ["whitened", "found"])
def test_text_that_no_statistic_has_seen_is_the_judge_and_all_windows_train(work, start, trained_state):
    work = replace(work, unseen=text_windows(3, seed=77))
    form = "free" if start == "found" else "grassmann"
    BlockCollaborative(start=start, form=form, steps=20, free_steps=20, free_rate=3e-3, batch=6).refine_(work)
    measured = block_errors(work, "anchored", ids=work.unseen)
    expected = [min(n["reached"], n["as_found"]) if n["rolled_back"] else n["reached"] for n in work.notes]
    assert measured == pytest.approx(expected, rel=1e-3)


def test_held_out_windows_train_nothing(work):
    """Other held-out windows, same training windows: a single unchecked path gives the same factors."""
    batches, train, held_out = split_windows(work.windows, 6, 0.1)
    assert [len(b) for b in batches] == [6, 6, 6, 2]
    assert (train, held_out) == ([0, 1, 2], [3])
    assert torch.equal(torch.cat(batches), work.windows)
