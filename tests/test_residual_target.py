"""Closed forms against brute-force least squares; float64."""

import pytest
import torch

from eckart.refiners._residual_target import blend, regress

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def brute_force(targets, inputs, rank):
    """Reduced-rank regression by its textbook recipe: least squares, then the SVD of the *fitted values*."""
    solution = torch.linalg.lstsq(inputs.T, targets.T).solution.T
    u = torch.linalg.svd(solution @ inputs, full_matrices=False)[0][:, :rank]
    return u @ u.T @ solution


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_regression_equals_brute_force(shape, rank):
    weight, inputs = normal(*shape), normal(shape[1], 60, seed=1)
    targets = weight @ inputs + 0.5 * normal(shape[0], 60, seed=2)
    basis, coefficients = regress(weight, targets @ inputs.T, inputs @ inputs.T, rank, damping=1e-13)
    expected = brute_force(targets, inputs, rank)
    assert basis.shape == (rank, shape[1])
    assert float((coefficients @ basis - expected).norm() / expected.norm()) < 1e-9
    assert torch.allclose(coefficients.T @ coefficients, torch.eye(rank, dtype=DOUBLE), atol=1e-9)


def test_regression_beats_every_perturbation():
    """An oracle without a formula: no small change of the factors has a smaller error."""
    weight, inputs = normal(6, 7), normal(7, 50, seed=1)
    targets = weight @ inputs + normal(6, 50, seed=2)
    basis, coefficients = regress(weight, targets @ inputs.T, inputs @ inputs.T, 3, damping=1e-13)
    best = float((targets - coefficients @ basis @ inputs).square().sum())
    for seed in range(30):
        moved = (coefficients + 1e-3 * normal(6, 3, seed=seed)) @ (basis + 1e-3 * normal(3, 7, seed=seed + 50))
        assert float((targets - moved @ inputs).square().sum()) > best


def test_own_outputs_as_the_target_are_svd_llm():
    weight, inputs = normal(6, 7), normal(7, 50, seed=1)
    gram = inputs @ inputs.T
    basis, coefficients = regress(weight, weight @ gram, gram, 3)
    error = float((weight @ inputs - coefficients @ basis @ inputs).norm())
    tail = float(torch.linalg.svdvals(weight @ inputs)[3:].square().sum().sqrt())
    assert error == pytest.approx(tail, rel=1e-5)  # the damping of 1e-6 keeps them this far apart


def test_directions_without_data_keep_the_weight():
    """With fewer tokens than features the Gram is singular; full rank still gives the weight back."""
    weight, inputs = normal(6, 7), normal(7, 3, seed=1)
    gram = inputs @ inputs.T
    basis, coefficients = regress(weight, weight @ gram, gram, 6)
    assert torch.allclose(coefficients @ basis, weight, atol=1e-6)


def test_blend():
    own, target = normal(3, 4), normal(3, 4, seed=1)
    assert torch.equal(blend(own, target, 0.0), own)
    assert torch.equal(blend(own, target, 1.0), target)
