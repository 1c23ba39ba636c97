"""The two-sided metric against brute force, its identities, and its prediction against the measured KL."""

from dataclasses import replace

import pytest
import torch

from eckart.checks import gram_of, problem
from eckart.errors import OptionError
from eckart.factorizers.two_sided import TwoSided
from eckart.model.discovery import discover
from eckart.portable.linear import weight_view
from eckart.statistics.sums import GroupStatistics, Need
from eckart.statistics.sweep import sweep
from eckart.testing import tiny_models
from eckart.types import Group, Target

SHAPES = ((5, 4), (4, 5), (4, 4))
EXACT = {"input_shrinkage": 0.0, "gradient_shrinkage": 0.0}


def loss_of(difference, x, gradient):
    """`1/2 tr(G D H D^T) / N^2` from raw inputs `[N, in]` and gradients `[N, out]`."""
    return float((gradient @ difference @ x.T).square().sum() / (2 * len(x) * len(gradient)))


def raw_problem(out_features, in_features, tokens=40, seed=0):
    """A group, its weight, and statistics with the raw inputs and gradients they were made of."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, in_features), (tokens, out_features), (out_features, in_features))
    )
    x, gradient = x * torch.logspace(0, -1, in_features), gradient * torch.logspace(-1, 0, out_features)
    group, _, (statistics) = problem(out_features, in_features, tokens)
    statistics = replace(
        statistics.members[0],
        input_gram=gram_of(x),
        output_gram=gram_of(x @ weight.T),
        input_energy=float(x.square().sum()) / in_features,
        gradient_gram=gram_of(gradient),
        pulled_gradient_gram=gram_of(gradient @ weight),
        gradient_energy=float(gradient.square().sum()) / out_features,
        tokens=tokens,
        predictions=tokens,
    )
    return group, weight, statistics, x, gradient


def best_by_descent(weight, x, gradient, rank):
    """The smallest loss that gradient descent over two free factors finds from ten starts."""
    best = float("inf")
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
        )
        optimizer = torch.optim.LBFGS([a, b], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(a=a, b=b, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (gradient @ (weight - a @ b) @ x.T).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        best = min(best, loss_of((weight - a @ b).detach(), x, gradient))
    return best


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_cut_is_the_optimum_that_descent_finds(shape, rank):
    group, weight, statistics, x, gradient = raw_problem(*shape)
    made = TwoSided(**EXACT).decompose(group, [weight], GroupStatistics((statistics,)))
    reached = loss_of(weight - made.truncate(rank).product(), x, gradient)
    assert reached == pytest.approx(best_by_descent(weight, x, gradient, rank), rel=1e-6)
    assert made.spectrum.loss(rank) == pytest.approx(reached, rel=1e-9)
    assert made.spectrum.loss(None) == 0.0


def test_the_untransposed_root_is_another_metric():
    """A published code takes the SVD of `L W R` with `G = L L^T`; on skewed gradients it is worse."""
    group, weight, statistics, x, gradient = raw_problem(6, 6)
    root_in, root_out = (torch.linalg.cholesky(m.T @ m) for m in (x, gradient))
    u, s, vt = torch.linalg.svd(root_out @ weight @ root_in)
    untransposed = torch.linalg.inv(root_out) @ (u[:, :2] * s[:2]) @ vt[:2] @ torch.linalg.inv(root_in)
    made = TwoSided(**EXACT).decompose(group, [weight], GroupStatistics((statistics,)))
    assert loss_of(weight - untransposed, x, gradient) > 1.05 * made.spectrum.loss(2)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_smaller_side_gives_what_both_grams_give(shape):
    """Identities 3 and 4, shrinkage included: dense Grams on both sides against what the sweep collects."""
    factorizer = TwoSided(input_shrinkage=0.01, gradient_shrinkage=0.1)
    group, weight, statistics, x, gradient = raw_problem(*shape, tokens=64)
    made = factorizer.decompose(group, [weight], GroupStatistics((statistics,)))
    mixed = []
    for rows, share in ((x, 0.01), (gradient, 0.1)):
        gram = rows.T @ rows
        mixed.append((1 - share) * gram + share * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    root_in, root_out = (torch.linalg.cholesky(gram) for gram in mixed)
    u, s, vt = torch.linalg.svd(root_out.T @ weight @ root_in)
    expected = torch.linalg.solve(root_out.T, (u[:, :5] * s[:5]) @ vt[:5]) @ torch.linalg.inv(root_in)
    torch.testing.assert_close(made.truncate(5).product(), expected, rtol=1e-9, atol=1e-9)
    assert made.spectrum.loss(5) == pytest.approx(float(s[5:].square().sum()) / (2 * 64 * 64), rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_a_group_of_two_is_decomposed_in_the_sum_of_their_losses(shape):
    parts = [raw_problem(*shape, seed=seed) for seed in (1, 2)]
    group = Group(tuple(Target(f"blocks.{i}.linear", i, "linear", *shape, False) for i in (0, 1)))
    statistics = GroupStatistics(tuple(part[2] for part in parts))
    made = TwoSided(**EXACT).decompose(group, [part[1] for part in parts], statistics)
    x = torch.cat([part[3] for part in parts])  # each sees the mean input of both
    cut = made.truncate(4)
    losses = [
        loss_of(part[1] - coefficients @ cut.basis, x, part[4]) * len(x) / 80
        for part, coefficients in zip(parts, cut.coefficients, strict=True)
    ]
    assert made.spectrum.loss(4) == pytest.approx(sum(losses), rel=1e-6)


@pytest.mark.parametrize("options", [{"input_shrinkage": 1.0}, {"gradient_shrinkage": -0.1}])
def test_impossible_shrinkage_is_refused(options):
    with pytest.raises(OptionError, match=r"must lie in \[0, 1\)"):
        TwoSided(**options)


# The prediction on a model


def statistics_of(model, windows, *needs):
    result = {}
    for per_block in sweep(model, discover(model), windows, needs, batch_tokens=20_000):
        result.update(per_block)
    return result


@torch.no_grad()
def measured_kl(model, windows, name, difference):
    """Mean KL of the model's predictions from those with `difference` added to one weight, nats per token."""
    module = model.get_submodule(name)
    dense = model(input_ids=windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    weight_view(module).add_(difference)
    cut = model(input_ids=windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    weight_view(module).sub_(difference)
    return float((dense.exp() * (dense - cut)).sum(-1).mean())


def predicted_kl(factorizer, statistics, weight, difference):
    """What the metric says of a change of the weight, whatever its rank."""
    g = statistics.gradient_gram.matrix
    h = statistics.input_gram.matrix
    return factorizer.nats(GroupStatistics((statistics,))) * float(torch.trace(g @ difference @ h @ difference.T))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self_attn.v_proj", "mlp.down_proj"])
@pytest.mark.parametrize("block", [0, 1])
def test_the_prediction_is_the_kl_where_the_approximation_is_exact(kind, block):
    """A window of one token twice has one input, so that the two factors are independent and K-FAC is exact."""
    model = tiny_models()["llama"]()
    name, windows = f"model.layers.{block}.{kind}", torch.full((1, 2), 7)
    statistics = statistics_of(model, windows.repeat(20_000, 1), Need.GRADIENT_GRAM, Need.INPUT_GRAM)[name]
    weight = weight_view(model.get_submodule(name))
    difference = 3e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    predicted = predicted_kl(TwoSided(**EXACT), statistics, weight, difference.double())
    assert predicted == pytest.approx(measured_kl(model, windows, name, difference), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_the_prediction_is_near_the_kl_on_unlike_tokens(kind):
    model, name = tiny_models()["llama"](), f"model.layers.0.{kind}"
    windows = torch.randint(3, 128, (400, 16), generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(model, windows, Need.GRADIENT_GRAM, Need.INPUT_GRAM)[name]
    weight = weight_view(model.get_submodule(name))
    difference = 3e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    predicted = predicted_kl(TwoSided(**EXACT), statistics, weight, difference.double())
    assert predicted == pytest.approx(measured_kl(model, windows, name, difference), rel=0.4)
