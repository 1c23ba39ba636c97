"""The maths of output subspaces against finite differences, full decompositions and brute force; float64."""

import pytest
import torch

from eckart.maths.subspace import ProjectedAdam, orthonormal, tangent, top_subspace

DOUBLE = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def with_values(out, inner, values, seed=0):
    """A matrix with these singular values, and an invertible S with which `W S` has them."""
    root = torch.linalg.qr(normal(inner, inner, seed=seed + 1))[0] * torch.linspace(0.5, 2, inner, dtype=DOUBLE)
    u = torch.linalg.qr(normal(out, len(values), seed=seed + 2))[0]
    v = torch.linalg.qr(normal(inner, len(values), seed=seed + 3))[0]
    product = (u * torch.tensor(values, dtype=DOUBLE)) @ v.T
    return product @ torch.linalg.inv(root), root


def layer_loss(q, weight, seed=9):
    """A loss of the layer `x -> Q Q^T W x` that is not quadratic."""
    x, y = normal(weight.shape[1], 11, seed=seed), normal(weight.shape[0], 11, seed=seed + 1)
    return (torch.tanh(q @ (q.T @ weight) @ x) - y).square().mean()


SPECTRA = {
    "distinct": [5, 4, 3, 2, 1.0],
    "repeated among the kept": [4, 4, 4, 2, 1.0],
    "repeated among the discarded": [5, 4, 3, 1, 1.0],
    "repeated on both sides": [4, 4, 4, 1, 1.0],
    "a zero among the discarded": [5, 4, 3, 1, 0.0],
}


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (5, 5), (9, 5)])
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA.keys())
def test_gradient_equals_finite_differences(shape, values):
    """The exact gradient across the cut; degenerate values inside either set are harmless."""
    weight, root = with_values(*shape, values)
    root.requires_grad_()
    layer_loss(top_subspace(root, weight, 3, softening=0.0), weight).backward()
    for seed in range(4):
        direction, step = normal(*root.shape, seed=20 + seed), 1e-4
        # central differences of fourth order, so that their own error is far below 1e-6
        losses = [
            layer_loss(top_subspace(root.detach() + k * step * direction, weight, 3), weight) for k in (-2, -1, 1, 2)
        ]
        numeric = float(losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
        exact = float((root.grad * direction).sum())
        assert abs(numeric - exact) <= 1e-6 * max(abs(exact), float(root.grad.norm()) / 10)


def test_autograd_through_the_decomposition_fails_where_ours_does_not():
    """The naive gradient divides by the gaps inside the kept set."""
    weight, root = with_values(5, 8, [4, 4, 4, 1, 1.0])
    root.requires_grad_()
    vectors = torch.linalg.eigh(weight @ root @ root.T @ weight.T)[1][:, -3:]
    layer_loss(vectors, weight).backward()
    naive = root.grad.clone()
    root.grad = None
    layer_loss(top_subspace(root, weight, 3, softening=0.0), weight).backward()
    assert torch.isfinite(root.grad).all()
    assert not torch.isfinite(naive).all() or float((naive - root.grad).norm() / root.grad.norm()) > 1e-9


def test_softening_bounds_the_gradient_at_a_closed_gap_and_leaves_wide_gaps_alone():
    weight, root = with_values(5, 8, [4, 3, 2, 2 - 1e-12, 1.0])
    root.requires_grad_()
    layer_loss(top_subspace(root, weight, 3), weight).backward()
    assert torch.isfinite(root.grad).all()
    assert float(root.grad.norm()) < 1e3
    weight, root = with_values(5, 8, [5, 4, 3, 1, 0.5])
    grads = []
    for softening in (0.0, 1e-3):
        leaf = root.clone().requires_grad_()
        layer_loss(top_subspace(leaf, weight, 3, softening), weight).backward()
        grads.append(leaf.grad)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-4


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_projector_identity(shape):
    """`[W S]_r S^-1 = Q Q^T W`, against the textbook decomposition."""
    weight, root = normal(*shape), normal(shape[1], shape[1], seed=5)
    for rank in range(1, min(shape) + 1):
        u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)
        q = top_subspace(root, weight, rank)
        assert torch.allclose(q.T @ q, torch.eye(rank, dtype=DOUBLE), atol=1e-12)
        assert float((q @ (q.T @ weight) - expected).norm() / expected.norm()) < 1e-10


def test_a_rank_deficient_tall_weight_keeps_an_orthonormal_subspace():
    weight = normal(9, 2) @ normal(2, 5, seed=3)
    q = top_subspace(torch.eye(5, dtype=DOUBLE), weight, 2)
    assert torch.allclose(q @ (q.T @ weight), weight, atol=1e-10)


def test_full_rank_has_no_gradient_and_loses_nothing():
    weight, root = normal(4, 7), normal(7, 7, seed=2).requires_grad_()
    q = top_subspace(root, weight, 4)
    layer_loss(q, weight).backward()
    assert torch.equal(root.grad, torch.zeros_like(root))
    assert torch.allclose(q @ (q.T @ weight), weight)


def test_retraction_and_tangent():
    q, d = orthonormal(normal(7, 3)), normal(7, 3, seed=1)
    assert torch.allclose(orthonormal(q), q)
    assert float((q.T @ tangent(q, d)).abs().max()) < 1e-12
    step = 1e-6
    moved = orthonormal(q + step * tangent(q, d))
    assert float((moved - q - step * tangent(q, d)).norm()) < 1e-10


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_projected_adam_finds_the_best_subspace(shape):
    """On a layer's own output error the best subspace is known: SVD-LLM's."""
    weight, x = normal(*shape), normal(shape[1], 40, seed=4) * torch.logspace(0, -1, shape[1], dtype=DOUBLE)[:, None]
    best = torch.linalg.svdvals(weight @ x)[3:].square().sum()
    q = orthonormal(normal(shape[0], 3, seed=8)).requires_grad_()
    adam = ProjectedAdam([q])
    for step in range(600):
        adam.zero_grad()
        loss = (weight @ x - q @ (q.T @ weight @ x)).square().sum()
        loss.backward()
        adam.step(0.03 * (1 - step / 600))
    assert torch.allclose(q.T @ q, torch.eye(3, dtype=DOUBLE), atol=1e-10)
    loss = loss.detach()
    assert float(loss) < 1.001 * float(best)
    assert float(loss) > (1 - 1e-9) * float(best)
