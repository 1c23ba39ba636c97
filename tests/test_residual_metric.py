"""The metric at a block's output: against autograd on the whole model, and what the refinement makes of it."""

from dataclasses import replace

import pytest
import torch
from test_block_collaborative import compressed, make_model, text_windows, trained_state  # noqa: F401

from eckart.errors import NumericalError, OptionError
from eckart.model.discovery import discover
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, walk
from eckart.refiners._block_descent import BlockError
from eckart.refiners._residual_metric import residual_grams, residual_metrics, shrunk
from eckart.refiners._two_streams import two_streams
from eckart.refiners.block_collaborative import BlockCollaborative
from eckart.storages.pair import FactorizedLinear
from eckart.testing import check_refiner, tiny_models

FAST = {"batch": 6, "rate": 3e-3, "free_rate": 3e-3, "steps": 30, "free_steps": 30}


@pytest.fixture
def work(trained_state):  # noqa: F811
    model = make_model()
    model.load_state_dict(trained_state)
    return compressed(model)


@pytest.fixture
def dense(trained_state):  # noqa: F811
    model = make_model()
    model.load_state_dict(trained_state)
    return model


def grams_by_autograd(model, windows, seed):
    """`sum g g^T` at each block's output from plain runs of the whole model, window by window, float64.

    The labels invert the cumulative sums of the model's own predictions at the draws of each window.
    """
    blocks, totals, outputs = model.get_submodule(discover(model).blocks), {}, {}

    def hook(module, args, output):
        outputs[module] = output[0] if isinstance(output, tuple) else output
        outputs[module].retain_grad()

    handles = [block.register_forward_hook(hook) for block in blocks]
    for number, ids in enumerate(windows):
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        draws = torch.rand(len(ids) - 1, generator=generator, dtype=torch.float64)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        sums = logits.detach().double().softmax(-1).cumsum(-1)
        labels = (draws[:, None] > sums).sum(-1)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for index, block in enumerate(blocks):
            g = outputs[block].grad[0].double()
            totals[index] = totals.get(index, 0.0) + g.T @ g
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return [totals[index] for index in range(len(blocks))]


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_grams_equal_autograd_on_the_whole_model_with_the_same_labels(family):
    model = tiny_models()[family]()
    windows = torch.randint(3, 128, (5, 12), generator=torch.Generator().manual_seed(0))
    found = residual_grams(model, discover(model), windows, batch_tokens=24, seed=3)
    for gram, expected in zip(found, grams_by_autograd(model, windows, seed=3), strict=True):
        torch.testing.assert_close(gram.matrix, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert gram.tokens == windows.numel()


def test_the_metrics_are_those_of_the_dense_model_and_the_factors_come_back(work, dense):
    before = {name: p.clone() for name, p in work.model.named_parameters()}
    found = residual_metrics(work, work.windows, 0.25, seed=1)
    for metric, gram in zip(found, grams_by_autograd(dense, work.windows, seed=1), strict=True):
        mean = gram.diagonal().mean()
        expected = 0.75 * gram / mean + 0.25 * torch.eye(32, dtype=torch.float64)
        torch.testing.assert_close(metric.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(isinstance(work.model.get_submodule(name), FactorizedLinear) for name in work.dense_weights)
    assert all(torch.equal(p, before[name]) for name, p in work.model.named_parameters())


def test_shrinkage_by_hand():
    gram = torch.tensor([[1.0, 0.5], [0.5, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(shrunk(gram, 0.5), torch.tensor([[0.75, 0.125], [0.125, 1.25]], dtype=torch.float64))
    torch.testing.assert_close(shrunk(gram, 1.0), torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(shrunk(torch.zeros_like(gram), 0.1), torch.eye(2, dtype=torch.float64))


def test_infinite_gradients_stop_with_the_name_of_the_block():
    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.1: NaN or infinity in the gradients"):
        residual_grams(model, discover(model), text_windows(2))


def test_the_weighted_error_is_that_of_the_outputs_through_the_root(work):
    """`|L^T e|^2 / |L^T y|^2`, token by token, and its gradient by finite differences."""
    work.model.double()
    here = next(two_streams(work, [work.windows[:3]]))
    goal = torch.randn(3, work.windows.shape[1], 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tril()
    error = BlockError(here, [goal], lower @ lower.T)
    layer = here.block.mlp.down_proj
    pair = layer.basis.weight.detach().clone(), layer.coefficients.weight.detach().clone().requires_grad_()

    @torch.no_grad()
    def direct(coefficients):
        layer.coefficients.weight.copy_(coefficients)
        missing = (here.run(0) - goal).reshape(-1, 32)
        weighed = [(lower.T @ e).square().sum() for e in missing]
        return float(sum(weighed) / sum((lower.T @ y).square().sum() for y in goal.reshape(-1, 32)))

    start, step = pair[1].detach().clone(), torch.zeros_like(pair[1])
    assert error.over({}, [0]) == pytest.approx(direct(start), rel=1e-10)
    error.of({"mlp.down_proj": pair}, 0).backward()
    step[3, 2] = 1e-4
    slope = (direct(start + step) - direct(start - step)) / 2e-4
    assert float(pair[1].grad[3, 2]) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("form", ["grassmann", "free"])
def test_the_identity_as_a_metric_is_the_plain_norm(trained_state, form):  # noqa: F811
    results = []
    for options in ({"metric": "plain"}, {"metric": "gradient", "gradient_shrinkage": 1.0}):
        model = make_model()
        model.load_state_dict(trained_state)
        work = compressed(model)
        BlockCollaborative(form=form, **FAST, **options).refine_(work)
        results.append((work.notes, [p.detach().clone() for p in model.parameters()]))
    (plain, one), (weighed, two) = results
    for a, b in zip(plain, weighed, strict=True):
        assert (a["rolled_back"], a["steps"]) == (b["rolled_back"], b["steps"])
        assert a["reached"] == pytest.approx(b["reached"], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True))
    assert any(not notes["rolled_back"] for notes in plain)


def weighted_errors(model, dense, ids, grams, shrinkage):
    """Output error of every block on `ids` in the metric, from whole blocks side by side and Cholesky roots."""
    result = []
    roots = [
        torch.linalg.cholesky((1 - shrinkage) * g + shrinkage * g.diagonal().mean() * torch.eye(len(g)).double())
        for g in grams
    ]
    with torch.no_grad():
        layout = discover(dense)
        ours, theirs = residence_of(model, layout), residence_of(dense, layout)
        compressed, truth = open_stream(model, ours, [ids]), open_stream(dense, theirs, [ids])
        for at, original, root in zip(walk(ours, compressed), walk(theirs, truth), roots, strict=True):
            output, goal = at.run(compressed, 0), original.run(truth, 0)
            error, size = (goal - output).double() @ root, goal.double() @ root
            result.append(float(error.square().sum() / size.square().sum()))
    return result


def floor_of(notes, fair):
    """What a block has to beat: the better of its starts, of which the found one may have seen what judges it."""
    if "layer_wise" not in notes:
        return notes["as_found"]
    return min(notes["as_found"], notes["layer_wise"]) if fair else notes["layer_wise"]


@pytest.mark.parametrize("more", [0, 4])
@pytest.mark.parametrize("start", ["whitened", "found"])
def test_the_weighted_error_falls_on_held_out_windows_or_the_block_is_rolled_back(work, dense, start, more):
    """What the notes say is measured here with grams from autograd on the training windows alone.

    Unseen windows are held out if there are any, else a tenth of the twenty, which the factors that were found have
    seen: a whitened start is then compared with whitened factors of the other windows alone.
    """
    unseen = text_windows(more, seed=77)
    work = replace(work, unseen=unseen)
    trained, ids = (work.windows, unseen) if more else (work.windows[:-2], work.windows[-2:])
    grams = grams_by_autograd(dense, trained, seed=5)
    first = weighted_errors(work.model, dense, ids, grams, 0.2)[0]
    options = {"form": "free", "start": start, "metric": "gradient", "gradient_shrinkage": 0.2, "seed": 5}
    BlockCollaborative(**FAST, **options).refine_(work)
    assert work.notes[0]["as_found"] == pytest.approx(first, rel=1e-3)
    for notes in work.notes:
        floor = floor_of(notes, fair=more > 0)
        assert (notes["reached"] < floor) != notes["rolled_back"]
        assert ("layer_wise" in notes) == (start == "whitened")
    assert sum(not notes["rolled_back"] for notes in work.notes) >= 2
    left = [floor_of(n, fair=more > 0) if n["rolled_back"] else n["reached"] for n in work.notes]
    assert weighted_errors(work.model, dense, ids, grams, 0.2) == pytest.approx(left, rel=1e-3)


def test_the_descent_goes_after_the_metric_that_it_was_given(trained_state, dense):  # noqa: F811
    """On windows that were trained on, each metric ends with the lower error of its own kind in the first block."""
    grams, reached = None, {}
    for metric in ("plain", "gradient"):
        model = make_model()
        model.load_state_dict(trained_state)
        work = compressed(model)
        options = {"form": "free", "start": "found", "metric": metric, "gradient_shrinkage": 1e-3}
        BlockCollaborative(**{**FAST, "free_steps": 100}, **options).refine_(work)
        grams = grams or grams_by_autograd(dense, work.windows[:-2], seed=0)
        reached[metric] = [weighted_errors(model, dense, work.windows[:2], grams, a)[0] for a in (1.0, 1e-3)]
    assert reached["plain"][0] < reached["gradient"][0]
    assert reached["gradient"][1] < 0.95 * reached["plain"][1]


def test_found_begins_at_the_factors_in_place_to_the_bit(work):
    before = {name: p.clone() for name, p in work.model.named_parameters()}
    options = {"form": "free", "start": "found", "free_steps": 3, "free_rate": 1e-30, "batch": 6}
    BlockCollaborative(**options).refine_(work)
    assert all(notes["rolled_back"] for notes in work.notes)
    assert all(torch.equal(p, before[name]) for name, p in work.model.named_parameters())


def test_no_gradient_is_left_behind(work):
    """Dense layers and norms of a block are not trained, and no memory goes into their gradients."""
    BlockCollaborative(form="free", start="found", free_steps=2, batch=6).refine_(work)
    assert all(p.grad is None for p in work.model.parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start": "found"}, "start is found, but the form grassmann ties"),
        ({"start": "found", "form": "svd"}, r"use block_collaborative\.form=free"),
        ({"gradient_shrinkage": 1.5}, r"gradient_shrinkage is 1\.5, but must lie in \[0, 1\]"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError, match=text):
        BlockCollaborative(**options)


def test_the_contract_with_a_shared_basis_and_dense_layers():
    check_refiner(BlockCollaborative(form="free", start="found", metric="gradient", free_steps=5, batch=3))
