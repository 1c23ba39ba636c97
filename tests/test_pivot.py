"""Pivoted storage holds the very same matrix: random, adversarial and nearly rank-deficient ones."""

import numpy as np
import pytest
import torch

from eckart.maths.pivot import BOUND, default_pivots, interpolate, pivoted, unpivoted

SIDES = ("rows", "columns")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs():
    """`{what makes it hard: (coefficients [out, rank], basis [rank, in])}`."""
    a, b = normal(30, 8), normal(8, 22, seed=1)
    scales = torch.logspace(0, -14, 8).double()
    repeated = a.clone()
    repeated[10:] = repeated[3]
    return {
        "random": (a, b),
        "square": (normal(20, 19), normal(19, 20)),
        "rank one": (a[:, :1], b[:1]),
        "falling singular values": (torch.linalg.qr(a).Q * scales, torch.linalg.qr(b.T).Q.T),
        "falling in both factors": (a * scales, scales[:, None] * b),
        "equal rows": (repeated, b),
        "rank deficient": (torch.cat([a[:, :4], a[:, :4]], 1), torch.cat([b[:4], b[:4]])),
        "rows of unlike size": (a * torch.logspace(8, -8, 30).double()[:, None], b),
        "ones": (torch.ones(9, 3).double(), torch.ones(3, 7).double()),
        "zero": (torch.zeros(9, 3).double(), torch.zeros(3, 7).double()),
        "huge": (a * 1e150, b * 1e100),
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", sorted(pairs()))
def test_the_product_is_the_same(kind, side):
    coefficients, basis = pairs()[kind]
    product, (out_features, rank), in_features = coefficients @ basis, coefficients.shape, basis.shape[1]
    made = pivoted(basis, coefficients, side)
    assert float((made.product() - product).abs().max()) <= 1e-12 * float(product.abs().max())
    assert made.basis.numel() + made.coefficients.numel() == rank * (out_features + in_features - rank)
    assert made.index.dtype == torch.int32
    assert sorted(made.index.tolist()) == list(range(out_features if side == "rows" else in_features))
    stored = made.coefficients if side == "rows" else made.basis
    assert float(stored.abs().max()) <= BOUND * (1 + 1e-9)
    again_basis, again_coefficients = unpivoted(made)
    again = again_coefficients @ again_basis
    assert float((again - product).abs().max()) <= 1e-12 * float(product.abs().max())


def test_what_is_kept_are_rows_and_columns_of_the_matrix():
    coefficients, basis = pairs()["random"]
    product = coefficients @ basis
    rows, columns = (pivoted(basis, coefficients, side) for side in SIDES)
    torch.testing.assert_close(rows.basis, product[torch.argsort(rows.index)[:8]])
    torch.testing.assert_close(columns.coefficients, product[:, columns.index[:8].long()])


def kahan(size, angle=1.2):
    """The classic matrix that QR with column pivoting does not permute and whose inverse grows like 2^size."""
    s, c = np.sin(angle), np.cos(angle)
    upper = np.eye(size) - c * np.triu(np.ones((size, size)), 1)
    return (s ** np.arange(size))[:, None] * upper * (1 - 1e-9 * np.arange(size))


def test_rows_are_swapped_until_the_bound_holds():
    """Plain column pivoting leaves large coefficients on Kahan's matrix; the swaps take them away."""
    size = 24
    matrix = kahan(size)
    last = matrix[:, -1:] * 0.999  # what column pivoting would have to combine from all columns before
    rows = np.concatenate([matrix, 0.9 * np.linalg.norm(last) * np.eye(size)[:, -1:], last], axis=1).T
    loose = interpolate(rows, bound=1e9)[1]
    order, coefficients = interpolate(rows, bound=2.0)
    assert np.abs(loose).max() > 10
    assert np.abs(coefficients).max() <= 2.0
    np.testing.assert_allclose(rows[order[size:]], coefficients @ rows[order[:size]], atol=1e-12)


@pytest.mark.parametrize("bound", [1.05, 1.5, 4.0])
def test_any_bound_above_one_is_kept(bound):
    rows = np.linalg.qr(normal(60, 20).numpy())[0]
    order, coefficients = interpolate(rows, bound)
    assert np.abs(coefficients).max() <= bound * (1 + 1e-9)
    np.testing.assert_allclose(rows[order[20:]], coefficients @ rows[order[:20]], atol=1e-12)


def test_the_smaller_side_is_permuted():
    assert default_pivots(10, 20) == default_pivots(10, 10) == "rows"
    assert default_pivots(20, 10) == "columns"
    assert pivoted(normal(4, 10), normal(20, 4)).index.shape == (10,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype):
    made = pivoted(normal(4, 10).to(dtype), normal(20, 4).to(dtype))
    assert made.basis.dtype == made.coefficients.dtype == dtype


@pytest.mark.parametrize("rank", [10, 12])
def test_full_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}, but .* needs a rank in \[1, 9\]; .* dense"):
        pivoted(normal(rank, 10), normal(20, rank))
