"""Shrinkage by held-out prediction: against dense Grams and explicit cuts, and where the answer is known beforehand."""

import json
import logging
from math import floor

import pytest
import torch

import eckart
from eckart.errors import OptionError
from eckart.factorizers.two_sided import TwoSided
from eckart.linalg import Decomposition
from eckart.model.discovery import discover
from eckart.statistics.sums import Gram, GroupStatistics, Need, Statistics
from eckart.statistics.sweep import sweep
from eckart.testing import check_factorizer, tiny_models, tiny_tokenizer
from eckart.types import Group, Target

CANDIDATES = (0.03, 0.1, 0.3)
INPUTS = TwoSided().input_shrinkage
FEW = [(9, 14), (14, 9), (11, 11)]
TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (20_000,), generator=torch.Generator().manual_seed(0)))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def group_of(out_features, in_features, count=1):
    return Group(tuple(Target(f"blocks.{i}.x", i, "x", out_features, in_features, False) for i in range(count)))


def add(statistics, weight, x, gradient, shared):
    """Add tokens as the sweep does: only the Grams on the smaller side, but the input Gram of a shared basis."""
    tall = weight.shape[0] > weight.shape[1]
    rows = {"input_gram": x} if tall or shared else {"output_gram": x @ weight.T}
    rows |= {"pulled_gradient_gram": gradient @ weight} if tall else {"gradient_gram": gradient}
    for name, values in rows.items():
        if getattr(statistics, name) is None:
            setattr(statistics, name, Gram(values.shape[1]))
        getattr(statistics, name).add_(values)
    statistics.tokens += len(x)
    statistics.predictions += len(gradient)
    statistics.input_energy += float(x.square().sum()) / x.shape[1]
    statistics.gradient_energy += float(gradient.square().sum()) / gradient.shape[1]


def marked(weight, early, late, shared=False):
    """Statistics of `early` and then `late`, pairs of inputs and gradients `[tokens, ...]`, marked between."""
    statistics = Statistics()
    add(statistics, weight, *early, shared)
    statistics.mark()
    add(statistics, weight, *late, shared)
    return statistics


def tokens_of(weight, tokens, seed):
    out_features, in_features = weight.shape
    x = normal(tokens, in_features, seed=seed) * torch.logspace(0, -1, in_features)
    return x, normal(tokens, out_features, seed=seed + 1) * torch.logspace(-1, 0, out_features)


def shrunk(rows, share):
    gram = rows.T @ rows
    return (1 - share) * gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def explicit_cut(weight, x, gradient, input_share, gradient_share, rank):
    """The best cut from both dense Grams and their Cholesky factors."""
    root_in, root_out = (torch.linalg.cholesky(shrunk(*k)) for k in ((x, input_share), (gradient, gradient_share)))
    u, s, vt = torch.linalg.svd(root_out.T @ weight @ root_in)
    return torch.linalg.solve(root_out.T, (u[:, :rank] * s[:rank]) @ vt[:rank]) @ torch.linalg.inv(root_in)


def loss_of(difference, x, gradient):
    """`1/2 tr(G D H D^T) / N^2` from raw inputs and gradients."""
    return float((gradient @ difference @ x.T).square().sum() / (2 * len(x) * len(gradient)))


def explicit_losses(weight, early, late, shares=(0.6, 0.8)):
    """What each candidate's cuts of the early tokens lose on the late ones, with every Gram dense."""
    out_features, in_features = weight.shape
    ranks = [floor(share * out_features * in_features / (out_features + in_features)) for share in shares]
    return {
        a: sum(loss_of(weight - explicit_cut(weight, *early, INPUTS, a, rank), *late) for rank in ranks)
        for a in CANDIDATES
    }


@pytest.mark.parametrize("shape", [*FEW, (1, 9)])
def test_a_cut_is_judged_in_another_metric_from_the_smaller_side(shape):
    weight = normal(*shape, seed=1)
    early, late = tokens_of(weight, 30, seed=2), tokens_of(weight, 20, seed=4)
    first, second = marked(weight, early, late).early, marked(weight, early, late).late
    plain = TwoSided(input_shrinkage=0.0, gradient_shrinkage=0.0)
    metric = TwoSided().metric(weight, GroupStatistics((first,)))
    made = Decomposition(weight, metric)
    tails = made.tails_in(plain.metric(weight, GroupStatistics((second,)))) / (2 * 20 * 20)
    for rank in range(min(shape)):
        basis, coefficients = made.truncate(rank)
        assert float(tails[rank]) == pytest.approx(loss_of(weight - coefficients @ basis, *late), rel=1e-8)
    assert tails.shape == (min(shape) + 1,)
    assert float(tails[-1]) == 0.0
    own = made.tails_in(metric)
    expected = torch.stack([made.values[rank:].square().sum() for rank in range(min(shape) + 1)])
    torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9 * float(expected[0]))


@pytest.mark.parametrize("shape", FEW)
def test_the_held_out_losses_are_those_of_explicit_cuts(shape):
    weight = normal(*shape, seed=1)
    early, late = tokens_of(weight, 30, seed=2), tokens_of(weight, 12, seed=4)
    made = TwoSided(gradient_shrinkage="auto").decompose(
        group_of(*shape), [weight], GroupStatistics((marked(weight, early, late),))
    )
    expected = explicit_losses(weight, early, late)
    told = made.details["held_out_loss"]
    assert {float(a) for a in told} == set(CANDIDATES)
    assert {float(a): loss for a, loss in told.items()} == pytest.approx(expected, rel=1e-5)
    assert made.details["gradient_shrinkage"] == min(expected, key=expected.__getitem__)


@pytest.mark.parametrize("shape", FEW)
def test_unseen_losses_are_those_of_explicit_cuts_on_the_last_quarter(shape):
    """In nats per token, at every rank where they fall; the cuts themselves are made from all of the text."""
    weight = normal(*shape, seed=1)
    early, late = tokens_of(weight, 30, seed=2), tokens_of(weight, 12, seed=4)
    statistics = GroupStatistics((marked(weight, early, late),))
    spectrum = TwoSided().decompose(group_of(*shape), [weight], statistics).spectrum
    full = min(shape)
    explicit = [loss_of(weight - explicit_cut(weight, *early, INPUTS, 0.1, rank), *late) for rank in range(full)]
    expected = [max(explicit[rank:]) for rank in range(full)]  # a higher rank never loses more
    assert [spectrum.loss(rank) for rank in range(full)] == pytest.approx(expected, rel=1e-6)
    assert spectrum.loss(full) == 0.0
    seen = TwoSided(losses="seen").decompose(group_of(*shape), [weight], statistics).spectrum
    assert seen.unseen is None
    assert torch.equal(seen.values, spectrum.values)
    assert spectrum.loss(full // 2) > seen.loss(full // 2)


def test_the_choice_is_used_with_all_of_the_text():
    weight = normal(9, 14, seed=1)
    early, late = tokens_of(weight, 30, seed=2), tokens_of(weight, 12, seed=4)
    statistics = GroupStatistics((marked(weight, early, late),))
    made = TwoSided(gradient_shrinkage="auto").decompose(group_of(9, 14), [weight], statistics)
    all_of_it = [torch.cat(pair) for pair in zip(early, late, strict=True)]
    expected = explicit_cut(weight, *all_of_it, INPUTS, made.details["gradient_shrinkage"], 4)
    torch.testing.assert_close(made.truncate(4).product(), expected, rtol=1e-9, atol=1e-9)
    fixed = TwoSided(gradient_shrinkage=made.details["gradient_shrinkage"])
    assert made.spectrum.loss(4) == fixed.decompose(group_of(9, 14), [weight], statistics).spectrum.loss(4)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_a_group_is_judged_by_the_summed_loss_of_its_members(shape):
    out_features, in_features = shape
    weights = [normal(*shape, seed=seed) for seed in (1, 2)]
    early, late = ([tokens_of(w, n, seed=n + i) for i, w in enumerate(weights)] for n in (40, 16))
    members = tuple(marked(w, *parts, shared=True) for w, *parts in zip(weights, early, late, strict=True))
    statistics, group = GroupStatistics(members), group_of(*shape, count=2)
    made = TwoSided(gradient_shrinkage="auto").decompose(group, weights, statistics)
    first, _ = statistics.early_and_late
    x = torch.cat([pair[0] for pair in late])  # each member sees the mean input of both
    for a in CANDIDATES:
        cuts = TwoSided(gradient_shrinkage=a).decompose(group, weights, first)
        expected = 0.0
        for share in (0.6, 0.8):
            cut = cuts.truncate(floor(share * 2 * out_features * in_features / (2 * out_features + in_features)))
            for weight, coefficients, (_, gradient) in zip(weights, cut.coefficients, late, strict=True):
                expected += loss_of(weight - coefficients @ cut.basis, x, gradient)
        assert made.details["held_out_loss"][f"{a:g}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize(("tokens", "spread", "wins"), [((12, 4), 0.0, 0.3), ((20_000, 7_000), 2.0, 0.03)])
def test_noisy_gradients_want_much_shrinkage_and_abundant_ones_little(shape, tokens, spread, wins):
    """Few gradients of no preferred direction show directions that are not there; many of a true one show it."""
    out_features, in_features = shape
    weight, scale = normal(*shape, seed=1), torch.logspace(0, -spread, out_features).double()
    turn = torch.linalg.qr(normal(out_features, out_features, seed=7)).Q
    parts = [
        (normal(5000, in_features, seed=seed), (normal(count, out_features, seed=seed + 1) * scale) @ turn)
        for count, seed in zip(tokens, (2, 4), strict=True)
    ]
    statistics = GroupStatistics((marked(weight, *parts),))
    made = TwoSided(gradient_shrinkage="auto").decompose(group_of(*shape), [weight], statistics)
    assert made.details["gradient_shrinkage"] == wins
    truth = turn.T @ torch.diag(scale.square()) @ turn  # what gradients are drawn from; inputs have the identity
    losses = {}
    for a in CANDIDATES:
        cut = TwoSided(gradient_shrinkage=a).decompose(group_of(*shape), [weight], statistics).truncate(10)
        difference = weight - cut.product()
        losses[a] = float(torch.trace(difference.T @ truth @ difference))
    assert min(losses, key=losses.__getitem__) == wins  # right for text that nobody has seen, too


def test_the_sweep_keeps_the_two_parts_apart():
    model = tiny_models()["llama"]()
    windows = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(0))
    needs = {Need.SMALLER_GRAM, Need.TRUE_GRADIENT_GRAM}  # labels that are not drawn

    def collected(ids):
        found = {}
        for per_block in sweep(model, discover(model), ids, needs, batch_tokens=24):
            found.update(per_block)
        return found

    whole, first, last = collected(windows), collected(windows[:6]), collected(windows[6:])
    for name, statistics in whole.items():
        for part, expected in ((statistics.early, first[name]), (statistics.late, last[name])):
            for field in ("tokens", "predictions", "input_energy", "gradient_energy"):
                assert getattr(part, field) == pytest.approx(getattr(expected, field), rel=1e-5)
            assert len(part.grams) == len(expected.grams) == 2
            for gram, other in zip(part.grams, expected.grams, strict=True):
                assert gram.tokens == other.tokens
                torch.testing.assert_close(gram.matrix, other.matrix, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrong", ["atuo", 1.0, -0.1])
def test_what_is_neither_a_share_nor_auto_is_refused(wrong):
    with pytest.raises(OptionError, match=r'gradient_shrinkage is .*, but must lie in \[0, 1\) or be "auto"'):
        TwoSided(gradient_shrinkage=wrong)


def compressed(tmp_path, windows, shrinkage="auto"):
    (tmp_path / "text.txt").write_text(TEXT)
    return eckart.compress(
        tiny_models()["llama"](),
        tokenizer=tiny_tokenizer(),
        recipe="eckart",
        keep=0.6,
        options={"factorizer.gradient_shrinkage": shrinkage},
        calibration=eckart.Calibration(str(tmp_path / "text.txt"), windows, 64),
        out=tmp_path / f"out-{windows}-{shrinkage}",
    )


def test_the_plan_says_what_was_chosen(tmp_path):
    made = compressed(tmp_path, windows=96)  # three batches
    rows = json.loads((tmp_path / "out-96-auto" / "plan.json").read_text())["entries"]
    cut = [row["details"] for row in rows if row["rank"] != "dense"]
    assert cut
    assert all(details["gradient_shrinkage"] in CANDIDATES for details in cut)
    for details in cut:
        told = details["held_out_loss"]
        assert told[f"{details['gradient_shrinkage']:g}"] == min(told.values())
    assert made.provenance["recipe"]["factorizer"]["gradient_shrinkage"] == "auto"


def test_one_batch_falls_back_and_says_so_once(tmp_path, caplog):
    check_factorizer(TwoSided(gradient_shrinkage="auto"))  # statistics without a mark
    with caplog.at_level(logging.WARNING, logger="eckart"):
        made = compressed(tmp_path, windows=8)
    said = [record.getMessage() for record in caplog.records if "gradient_shrinkage" in record.getMessage()]
    assert said == [
        "gradient_shrinkage=auto needs two batches of calibration text or more; taking 0.1 (14 of 14 groups)"
    ]
    cut = [entry.details for entry in made.plan.entries if entry.rank is not None]
    assert all(details["gradient_shrinkage"] == 0.1 and "held_out_loss" not in details for details in cut)
    fixed = compressed(tmp_path, windows=8, shrinkage=0.1)
    pairs = zip(made.model.state_dict().values(), fixed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_shrinkage_that_is_to_be_chosen_has_no_metric_before():
    with pytest.raises(
        ValueError, match=r"^a shrinkage of 'auto' has no metric yet; decompose chooses a number for it$"
    ):
        TwoSided(gradient_shrinkage="auto").nats(GroupStatistics((Statistics(tokens=1, predictions=1),)))
