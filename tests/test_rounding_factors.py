"""Rounded factors: gauges and fits against plain algebra, and the loss predicted of each form against the one made."""

import pytest
import torch

from eckart.checks import gram_of
from eckart.factorizers.two_sided import TwoSided
from eckart.maths.rounding import Triangle, fit, loss_of, rounded
from eckart.maths.rounding_factors import best_pair, gauged, rounded_pair, rounded_pivoted, rounded_sum, tails_of
from eckart.planning.few_bits import FewBits, tensors_of
from eckart.statistics.sums import GroupStatistics, Statistics
from eckart.storages import find
from eckart.types import Group, Packing, Target

SHAPES = ((20, 33), (33, 20))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens, size, seed):
    """Correlated, some features louder than others; the shared part is small enough that grids hold what is made up."""
    shared = normal(tokens, size // 3, seed=seed) @ normal(size // 3, size, seed=seed + 1) / (size // 3) ** 0.5
    return (shared + 0.7 * normal(tokens, size, seed=seed + 2)) * (0.3 * normal(size, seed=seed + 3)).exp()


def gram(size, seed):
    x = inputs(4 * size, size, seed)
    return x.T @ x / len(x)


def case(shape, seed=0):
    return normal(*shape, seed=seed), gram(shape[1], seed + 10), gram(shape[0], seed + 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gauge_changes_nothing_but_the_factors(shape):
    _, h, g = case(shape)
    basis, coefficients = normal(7, shape[1], seed=1), normal(shape[0], 7, seed=2)
    b, a = gauged(basis, coefficients, h, g)
    assert torch.allclose(a @ b, coefficients @ basis, atol=1e-9)
    assert torch.allclose(a.T @ g @ a, torch.eye(7, dtype=torch.float64), atol=1e-8)
    squares = b @ h @ b.T
    assert torch.allclose(squares, squares.diagonal().diag(), atol=1e-7 * float(squares.max()))
    assert bool((squares.diagonal().diff() < 0).all())
    plain_b, plain_a = gauged(basis, coefficients, None, None)
    assert torch.allclose(plain_a @ plain_b, coefficients @ basis, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_correction_is_the_best_of_its_rank(shape):
    """Against the singular values of the error between Cholesky roots."""
    error, h, g = case(shape, 3)
    whitened = torch.linalg.cholesky(g).T @ error @ torch.linalg.cholesky(h)
    values = torch.linalg.svdvals(whitened)
    tails = tails_of(error, h, g)
    assert len(tails) == min(shape) + 1
    for rank in (1, 5, min(shape)):
        basis, coefficients = best_pair(error, rank, h, g)
        assert (basis.shape, coefficients.shape) == ((rank, shape[1]), (shape[0], rank))
        left = float(values[rank:].square().sum())
        assert loss_of(error - coefficients @ basis, h, g) == pytest.approx(left, abs=1e-8)
        assert float(tails[rank]) == pytest.approx(left, abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maker", [rounded_pair, rounded_pivoted])
def test_with_many_bits_the_factors_are_the_cut(shape, maker):
    """At 8 bits a cut is nearly what it was; fitted to its rounded basis, it beats two factors rounded alone."""
    weight, h, g = case(shape, 5)
    basis, coefficients = best_pair(weight, 6, h, g)
    cut = loss_of(weight - coefficients @ basis, h, g)
    losses = {
        bits: loss_of(weight - maker(weight, basis, coefficients, bits, 32, h, g).weight, h, g) for bits in (3, 4, 8)
    }
    assert cut <= losses[8] <= 1.02 * cut
    assert losses[8] < losses[4] < losses[3]
    alone = rounded(coefficients, 3, 32).weight @ rounded(basis, 3, 32).weight
    assert losses[3] < loss_of(weight - alone, h, g)


@pytest.mark.parametrize("shape", SHAPES)
def test_coefficients_fitted_to_a_basis_are_stationary(shape):
    """By autograd: before they are rounded, no change of the coefficients lowers the loss."""
    from eckart.maths.rounding_factors import _fitted

    weight, h, g = case(shape, 6)
    basis = normal(5, shape[1], seed=9)
    fitted, inner = _fitted(weight, basis, h)
    assert torch.allclose(inner, basis @ h @ basis.T)
    free = fitted.clone().requires_grad_()
    error = weight - free @ basis
    (gradient,) = torch.autograd.grad(torch.trace(g @ error @ h @ error.T), free)
    assert float(gradient.abs().max()) < 1e-7 * float(weight.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["packed", "packed_pair", "packed_pivoted", "packed_sum"])
def test_what_is_stored_is_what_was_made(shape, form):
    """Codes, scales and zeros through the packed tensors and the layer: the weight of the rounding, bit for bit."""
    weight, h, g = case(shape, 7)
    basis, coefficients = best_pair(weight, 6, h, g)
    made = {
        "packed": lambda: rounded(weight, 3, 32, h, g),
        "packed_pair": lambda: rounded_pair(weight, basis, coefficients, 4, 32, h, g),
        "packed_pivoted": lambda: rounded_pivoted(weight, basis, coefficients, 5, 32, h, g),
        "packed_sum": lambda: rounded_sum(weight, 4, 2, 8, 32, h, g),
    }[form]()
    spec = {"storage": form, "rank": {"packed_sum": 4}.get(form, 6), "group": 32}
    spec["bits"] = {"packed": 3, "packed_pair": 4, "packed_pivoted": 5, "packed_sum": 2}[form]
    layer = find(form).empty(*shape, spec, bias=False, dtype=torch.float64).to_empty(device="cpu")
    layer.load_state_dict(tensors_of(made))
    assert torch.allclose(layer.weight, made.weight, atol=1e-13)
    x = normal(3, shape[1], seed=4)
    assert torch.allclose(layer(x), x @ made.weight.T, atol=1e-11)


@pytest.mark.parametrize("bits", [5, 6, 8])  # with fewer, some of it runs off the ends of a grid
def test_what_rounding_loses_is_known_before(bits):
    weight, h, g = case((96, 128), 8)
    right, left = Triangle.of(h), Triangle.of(g)
    made = loss_of(rounded(weight, bits, 64, h, g).weight - weight, h, g)
    told = float(left.costs @ fit(weight, bits, 64, right.costs)[1].sum(1))
    assert told == pytest.approx(made, rel=0.15)
    assert told < made


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_the_loss_of_each_form_is_predicted_within_a_tenth(shape):
    out_features, in_features = shape
    weight = (
        normal(*shape, seed=1) @ normal(in_features, in_features, seed=2).mul(0.6 ** torch.arange(in_features).div(8))
    ).float()
    tokens = 4 * in_features
    x, gradient = inputs(tokens, in_features, 3), inputs(tokens, out_features, 13)
    statistics = Statistics(
        tokens=tokens, input_gram=gram_of(x), input_energy=float(x.square().sum() / in_features),
        gradient_gram=gram_of(gradient), gradient_energy=float(gradient.square().sum() / out_features),
        predictions=tokens,
    )  # fmt: skip
    group = Group((Target("blocks.0.linear", 0, "linear", out_features, in_features, False),))
    members, factorizer = GroupStatistics((statistics,)), TwoSided()
    decomposition = factorizer.decompose(group, [weight], members)
    few = FewBits.of(decomposition, weight, *factorizer.sides(members, {}))
    forms = few.forms(Packing(("packed", "packed_pair", "packed_sum"), (2, 3, 4, 5, 6, 8), 32))
    assert {form.storage for form in forms} == {"packed", "packed_pair", "packed_sum"}
    h, g = few.grams
    off = {}
    for form in forms:
        made = loss_of(few.round(form.of(group)).weight - weight, h, g)
        off[form.storage, form.rank, form.bits] = form.error / made
        assert form.bytes == sum(t.nbytes for t in tensors_of(few.round(form.of(group))).values())
    for (storage, rank, bits), ratio in off.items():
        near_full = (
            storage == "packed_pair" and rank > group.full_rank / 2
        )  # where more bits are always the better form
        assert (0.75 if near_full else 0.9) < ratio < 1.1, (storage, rank, bits, ratio)
