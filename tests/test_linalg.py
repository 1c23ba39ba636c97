"""The one decomposition, in every metric and both forms, against oracles of another make."""

import pytest
import torch

from eckart.linalg import Decomposition, Metric, Side, break_even_rank, damped

SHAPES = [(12, 20), (20, 12), (16, 16)]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gram(size, tokens, seed):
    x = normal(tokens, size, seed=seed) @ normal(size, size, seed=seed + 1)
    return x.T @ x


def relative(a, b):
    return float((a - b).norm() / b.norm())


def best_in_metric(weight, g, h, rank):
    """Textbook optimum through Cholesky factors and inverses: nothing shared with the package."""
    lower, right = torch.linalg.cholesky(g), torch.linalg.cholesky(h)
    u, s, vt = torch.linalg.svd(lower.T @ weight @ right)
    cut = u[:, :rank] * s[:rank] @ vt[:rank]
    return torch.linalg.inv(lower.T) @ cut @ torch.linalg.inv(right), s


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["none", "right", "left", "both", "left diagonal", "right diagonal"])
def test_product_equals_the_textbook_optimum(shape, sides):
    out, inner = shape
    weight = normal(*shape)
    eye_out, eye_in = torch.eye(out, dtype=torch.float64), torch.eye(inner, dtype=torch.float64)
    g, h, metric = eye_out, eye_in, Metric()
    if sides in ("right", "both"):
        h = gram(inner, 50, 3)
        metric = Metric(metric.left, Side(gram=h, damping=0))
    if sides in ("left", "both"):
        g = gram(out, 50, 5)
        metric = Metric(Side(gram=g, damping=0), metric.right)
    if sides == "left diagonal":
        g = torch.diag(normal(out, seed=7).abs() + 0.1)
        metric = Metric(left=Side(diagonal=g.diagonal(), damping=0))
    if sides == "right diagonal":
        h = torch.diag(normal(inner, seed=8).abs() + 0.1)
        metric = Metric(right=Side(diagonal=h.diagonal(), damping=0))
    made = Decomposition(weight, metric)
    for rank in (1, 5, min(shape)):
        expected, values = best_in_metric(weight, g, h, rank)
        basis, coefficients = made.truncate(rank)
        assert relative(coefficients @ basis, expected) < 1e-8
        assert relative(made.values, values) < 1e-8


@pytest.mark.parametrize("shape", SHAPES)
def test_error_in_the_metric_is_the_tail_of_the_spectrum(shape):
    weight, h = normal(*shape), gram(shape[1], 60, 3)
    made = Decomposition(weight, Metric(right=Side(gram=h, damping=0)))
    for rank in range(1, min(shape)):
        basis, coefficients = made.truncate(rank)
        residual = weight - coefficients @ basis
        error = torch.trace(residual @ h @ residual.T).sqrt()
        assert float(error) == pytest.approx(float(made.values[rank:].square().sum().sqrt()), rel=1e-10)


def test_cut_is_the_best_rank_r_approximation_of_the_outputs():
    weight, x = normal(12, 20), normal(50, 20, seed=3) @ normal(20, 20, seed=4)
    made = Decomposition(weight, Metric(right=Side(gram=x.T @ x, damping=0)))
    basis, coefficients = made.truncate(4)
    u, s, vt = torch.linalg.svd(weight @ x.T, full_matrices=False)
    assert relative(coefficients @ basis @ x.T, u[:, :4] * s[:4] @ vt[:4]) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [50, 4])
def test_projector_identity(shape, tokens):
    """[W S]_r S^-1 = U_r U_r^T W with U_r the top eigenvectors of W H W^T (methods.md 0.1)."""
    weight, h = normal(*shape), damped(gram(shape[1], tokens, 3), 1e-6)
    made = Decomposition(weight, Metric(right=Side(gram=h, damping=0)))
    _, vectors = torch.linalg.eigh(weight @ h @ weight.T)
    projector = vectors[:, -3:] @ vectors[:, -3:].T
    basis, coefficients = made.truncate(3)
    assert relative(coefficients @ basis, projector @ weight) < 1e-6


def test_the_side_that_is_never_needed():
    """Identities 2-4 of relatives.md: the larger Gram may be replaced by the weight seen through it."""
    for shape in ((12, 20), (20, 12)):
        weight, h, g = normal(*shape), gram(shape[1], 60, 3), gram(shape[0], 60, 5)
        both = Decomposition(weight, Metric(Side(gram=g, damping=0), Side(gram=h, damping=0)))
        if shape[0] < shape[1]:
            small = Metric(Side(gram=g, damping=0), None, outer=weight @ h @ weight.T)
        else:
            small = Metric(None, Side(gram=h, damping=0), inner=weight.T @ g @ weight)
        other = Decomposition(weight, small)
        for a, b in zip(both.truncate(5), other.truncate(5), strict=True):
            assert a.shape == b.shape
        products = [made.truncate(5)[1] @ made.truncate(5)[0] for made in (both, other)]
        assert relative(products[0], products[1]) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_rank_gives_the_weight_back_with_fewer_tokens_than_features(shape, dtype):
    weight = normal(*shape).to(dtype)
    metric = Metric(Side(gram=gram(shape[0], 3, 5)), Side(gram=gram(shape[1], 3, 3)))
    for m in (metric, Metric(right=metric.right), Metric(left=metric.left)):
        basis, coefficients = Decomposition(weight, m).truncate(min(shape))
        assert relative(coefficients @ basis, weight) < (1e-9 if dtype == torch.float64 else 1e-5)


def test_without_damping_unvisited_directions_are_lost():
    """The trap that damping exists for: in-sample error is nil, the weight is gone."""
    weight, x = normal(20, 12), normal(3, 12, seed=3)
    h = x.T @ x
    values, vectors = torch.linalg.eigh(h)
    seen = vectors[:, values > 1e-9 * values[-1]]
    pseudo = weight @ seen @ seen.T
    assert float((pseudo - weight).norm() / weight.norm()) > 0.5
    basis, coefficients = Decomposition(weight, Metric(right=Side(gram=h))).truncate(12)
    assert relative(coefficients @ basis, weight) < 1e-9


def test_whitened_beats_plain_on_skewed_inputs():
    weight, h = normal(12, 20), gram(20, 60, 3)

    def error(metric):
        basis, coefficients = Decomposition(weight, metric).truncate(4)
        residual = weight - coefficients @ basis
        return float(torch.trace(residual @ h @ residual.T))

    assert error(Metric(right=Side(gram=h))) < 0.9 * error(Metric())


def test_untransposed_left_root_is_a_different_metric():
    """L^T W R is right; L W R (a published bug) has a larger true error."""
    weight, g, h = normal(12, 12), gram(12, 30, 5), gram(12, 30, 3)
    lower, right = torch.linalg.cholesky(g), torch.linalg.cholesky(h)

    def error(product):
        residual = weight - product
        return float(torch.trace(g @ residual @ h @ residual.T))

    basis, coefficients = Decomposition(weight, Metric(Side(gram=g), Side(gram=h))).truncate(4)
    u, s, vt = torch.linalg.svd(lower @ weight @ right)
    wrong = torch.linalg.inv(lower) @ (u[:, :4] * s[:4] @ vt[:4]) @ torch.linalg.inv(right)
    assert error(coefficients @ basis) < 0.99 * error(wrong)


def test_coefficients_are_orthonormal_so_that_rounding_is_harmless():
    weight, h = normal(20, 12), gram(12, 60, 3) * torch.logspace(0, 6, 12).outer(torch.logspace(0, 6, 12))
    _, coefficients = Decomposition(weight, Metric(right=Side(gram=h))).truncate(5)
    assert relative(coefficients.T @ coefficients, torch.eye(5, dtype=torch.float64)) < 1e-10


def test_an_all_zero_gram_and_an_all_zero_weight_survive():
    zero = torch.zeros(12, 12, dtype=torch.float64)
    weight = normal(20, 12)
    basis, coefficients = Decomposition(weight, Metric(right=Side(gram=zero))).truncate(12)
    assert relative(coefficients @ basis, weight) < 1e-10
    made = Decomposition(torch.zeros(20, 12), Metric(right=Side(gram=gram(12, 30, 1))))
    assert float(made.values.abs().max()) == 0
    assert all(bool(torch.isfinite(part).all()) for part in made.truncate(3))


@pytest.mark.parametrize(("shape", "rank"), [((4096, 4096), 2048), ((11008, 4096), 2985), ((1024, 4096), 819)])
def test_break_even_ranks_of_methods_0_2(shape, rank):
    assert break_even_rank(*shape) == rank
