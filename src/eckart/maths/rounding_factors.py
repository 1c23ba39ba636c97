"""Rounding factors of a matrix: pairs, pivoted pairs, and a low-rank correction of what rounding left.

All in the metric of `eckart.maths.rounding`, `tr(G E H E^T)`. Of a product `A B` the basis B is rounded first, then A
is fitted anew to the rounded basis, exactly, and rounded in turn. Computed in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.maths.pivot import pivoted
from eckart.maths.rounding import Rounded, Triangle, rounded


@dataclass(frozen=True)
class RoundedPair:
    """`W ~ A B` with both factors on grids: `basis` `[rank, in]`, `coefficients` `[out, rank]`.

    With `index` `[out]`, int32, it is pivoted on rows: output i is entry `index[i]` of `(B x, A B x)`, and
    `coefficients` has `out - rank` rows.
    """

    basis: Rounded
    coefficients: Rounded
    index: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, float64."""
        basis = self.basis.weight
        product = self.coefficients.weight @ basis
        return product if self.index is None else torch.cat([basis, product])[self.index.long()]


@dataclass(frozen=True)
class RoundedSum:
    """`W ~ Q + A B`: a matrix on a grid, and a pair for what rounding left of it."""

    matrix: Rounded
    correction: RoundedPair

    @property
    def weight(self) -> Tensor:
        """`[out, in]`, float64."""
        return self.matrix.weight + self.correction.weight


def rounded_pair(
    weight: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    bits: int,
    group: int,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
) -> RoundedPair:
    """A pair near `weight` `[out, in]`, made from the product `coefficients @ basis`; a Gram that is None is I.

    In the gauge of `gauged` errors of different basis rows add up, all of one weight, so that each is rounded in H
    alone; and columns of A matter less the later they stand, so that a group of them can share a scale.
    """
    weight = weight.double()
    basis, coefficients = gauged(basis, coefficients, input_gram, output_gram)
    new_basis = rounded(basis, bits, group, input_gram)
    fitted, gram = _fitted(weight, new_basis.weight, input_gram)
    return RoundedPair(new_basis, rounded(fitted, bits, group, gram, output_gram))


def rounded_pivoted(
    weight: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    bits: int,
    group: int,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
) -> RoundedPair:
    """The same, pivoted on rows. The identity block costs nothing and is exact; its rows carry the basis's errors.

    What those errors do to the pivot rows, the other rows make up for as far as G couples them.
    """
    weight, rank = weight.double(), len(basis)
    matrix = pivoted(basis.double(), coefficients.double(), "rows")
    order = matrix.index.long().argsort()
    pivots, others = order[:rank], order[rank:]
    gram = torch.eye(len(weight)).to(weight) if output_gram is None else output_gram.double()
    gram = gram[order][:, order]
    rows = torch.cat([torch.eye(rank).to(weight), matrix.coefficients])
    new_basis = rounded(matrix.basis, bits, group, input_gram, rows.T @ gram @ rows)
    left = weight[pivots] - new_basis.weight
    made_up = torch.linalg.solve(gram[rank:, rank:], gram[rank:, :rank] @ left)
    fitted, inner = _fitted(weight[others] + made_up, new_basis.weight, input_gram)
    outer = None if output_gram is None else gram[rank:, rank:]
    return RoundedPair(new_basis, rounded(fitted, bits, group, inner, outer), matrix.index)


def rounded_sum(
    weight: Tensor,
    rank: int,
    bits: int,
    correction_bits: int,
    group: int,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
) -> RoundedSum:
    """A matrix in `bits` bits, and a pair of rank `rank` in `correction_bits` for what that left."""
    matrix = rounded(weight, bits, group, input_gram, output_gram)
    error = weight.double() - matrix.weight
    basis, coefficients = best_pair(error, rank, input_gram, output_gram)
    pair = rounded_pair(error, basis, coefficients, correction_bits, group, input_gram, output_gram)
    return RoundedSum(matrix, pair)


def best_pair(error: Tensor, rank: int, input_gram: Tensor | None, output_gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(basis [rank, in], coefficients [out, rank])` of the cut of an error with the least `tr(G E H E^T)`."""
    whitened, left, right = _whitened(error, input_gram, output_gram)
    if len(whitened) > whitened.shape[1]:
        _, vectors = torch.linalg.eigh(whitened.T @ whitened)
        kept = vectors[:, -rank:]
        basis = torch.linalg.solve_triangular(right.T, kept, upper=True).T
        return basis, error.double() @ right @ kept
    _, vectors = torch.linalg.eigh(whitened @ whitened.T)
    kept = vectors[:, -rank:]
    return kept.T @ left.T @ error.double(), torch.linalg.solve_triangular(left.T, kept, upper=True)


def tails_of(error: Tensor, input_gram: Tensor | None, output_gram: Tensor | None) -> Tensor:
    """`tr(G E H E^T)` of what is left of an error by its best cut at every rank, `[min(out, in) + 1]`."""
    whitened, _, _ = _whitened(error, input_gram, output_gram)
    small = whitened.T @ whitened if len(whitened) > whitened.shape[1] else whitened @ whitened.T
    return torch.cat([small.new_zeros(1), torch.linalg.eigvalsh(small).clamp(min=0).cumsum(0)]).flip(0)


def gauged(
    basis: Tensor, coefficients: Tensor, input_gram: Tensor | None, output_gram: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same product with `A^T G A = I` and `B H B^T` diagonal, falling: `(basis, coefficients)`."""
    basis, coefficients = basis.double(), coefficients.double()
    values, vectors = torch.linalg.eigh(_sandwich(coefficients.T, output_gram))
    scale = values.clamp(min=float(values[-1]) * 1e-14).sqrt()
    coefficients, basis = (coefficients @ vectors) / scale, scale[:, None] * (vectors.T @ basis)
    _, turn = torch.linalg.eigh(_sandwich(basis, input_gram))
    return turn.T.flip(0) @ basis, coefficients @ turn.flip(1)


def _fitted(weight: Tensor, basis: Tensor, input_gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """The coefficients with which a basis is nearest to the weight, `W H B^T (B H B^T)^-1`, and `B H B^T`."""
    weighed = basis if input_gram is None else basis @ input_gram.double()
    gram = weighed @ basis.T
    triangle = Triangle.of(gram, ordered=False)  # which a rounded basis that lost a rank still has
    factor = triangle.lower * triangle.diagonal.sqrt()
    return torch.cholesky_solve(weighed @ weight.T, factor).T, gram


def _sandwich(rows: Tensor, gram: Tensor | None) -> Tensor:
    return rows @ rows.T if gram is None else rows @ gram.double() @ rows.T


def _whitened(error: Tensor, input_gram: Tensor | None, output_gram: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(L^T E R, L, R)` with lower triangular roots of both Grams."""
    left, right = (_root(gram, size, error) for gram, size in zip((output_gram, input_gram), error.shape, strict=True))
    return left.T @ error.double() @ right, left, right


def _root(gram: Tensor | None, size: int, like: Tensor) -> Tensor:
    if gram is None:
        return torch.eye(size, dtype=torch.float64, device=like.device)
    triangle = Triangle.of(gram, ordered=False)
    return triangle.lower * triangle.diagonal.sqrt()
