"""Pure maths: metrics, the one decomposition, and its truncation. Tensors in, tensors out.

Everything rests on Eckart and Young (1936) in a metric. With `H = R R^T` on the input side and
`G = L L^T` on the output side, the error of a replacement is `||L^T (W - Ŵ) R||_F`, and the best
rank-r replacement is `L^-T [L^T W R]_r R^-1`. SVD, FWSVD, ASVD, SVD-LLM and K-FAC SVD differ only in
`L` and `R`.

No Cholesky factorisation (it fails on singular Grams) and no inverse matrix: roots come from
`eigh`, and of two equivalent forms the one with the smaller eigenproblem is taken.

- left form, out <= in: `U` from `L^T (W H W^T) L`; `Ŵ = L^-T U_r U_r^T L^T W`. `H` itself is not
  needed, only `W H W^T`.
- right form, out > in: `V` from `R^T (W^T G W) R`; `Ŵ = W R V_r V_r^T R^-1`. `G` itself is not
  needed, only `W^T G W`.

Computed in float64.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

Tensor = torch.Tensor

DAMPING = 1e-6


class Side:
    """One side of a metric: a positive definite matrix of size k, with its root.

    Give a `gram` `[k, k]`, a `diagonal` `[k]` (of the metric itself: the squares of the scales), or
    neither for the identity. `damping` is added to the diagonal as a fraction of its mean, so that
    directions that calibration never visited keep a small weight instead of none.
    """

    def __init__(self, *, gram: Tensor | None = None, diagonal: Tensor | None = None, damping: float = DAMPING) -> None:
        self.gram = None if gram is None else damped(gram.double(), damping)
        self.diagonal = None if diagonal is None else _damped_diagonal(diagonal.double(), damping)

    def sandwich(self, weight: Tensor) -> Tensor:
        """`W H W^T` for `weight` `[rows, k]`; needs no root."""
        weight = weight.double()
        if self.gram is not None:
            return weight @ self.gram @ weight.T
        scaled = weight if self.diagonal is None else weight * self.diagonal
        return scaled @ weight.T

    @cached_property
    def root(self) -> tuple[Tensor, Tensor]:
        """`(Q, s)` with `H = R R^T`, `R = Q diag(s)`; only for a Gram."""
        assert self.gram is not None
        values, vectors = torch.linalg.eigh(self.gram)
        floor = values[-1].clamp(min=0) * values.shape[0] * torch.finfo(values.dtype).eps
        return vectors, values.clamp(min=max(float(floor), 1e-300)).sqrt()

    def times_root(self, matrix: Tensor) -> Tensor:
        """`M R` for `matrix` `[rows, k]`."""
        matrix = matrix.double()
        if self.gram is not None:
            vectors, scale = self.root
            return (matrix @ vectors) * scale
        return matrix if self.diagonal is None else matrix * self.diagonal.sqrt()

    def times_root_inverse(self, matrix: Tensor) -> Tensor:
        """`M R^-1` for `matrix` `[rows, k]`, without forming an inverse."""
        matrix = matrix.double()
        if self.gram is not None:
            vectors, scale = self.root
            return (matrix / scale) @ vectors.T
        return matrix if self.diagonal is None else matrix / self.diagonal.sqrt()

    def times_root_transposed(self, matrix: Tensor) -> Tensor:
        """`M R^T` for `matrix` `[rows, k]`."""
        matrix = matrix.double()
        if self.gram is not None:
            vectors, scale = self.root
            return (matrix * scale) @ vectors.T
        return matrix if self.diagonal is None else matrix * self.diagonal.sqrt()


IDENTITY = Side()


@dataclass(frozen=True)
class Metric:
    """`||L^T (W - Ŵ) R||_F`. A side that is known only through the weight is `None`.

    `outer` is `W H W^T` `[out, out]` and replaces `right`; `inner` is `W^T G W` `[in, in]` and
    replaces `left`. At least one of `left`, `right` must be given.
    """

    left: Side | None = IDENTITY
    right: Side | None = IDENTITY
    outer: Tensor | None = None
    inner: Tensor | None = None


def damped(gram: Tensor, damping: float) -> Tensor:
    """`gram + damping * mean(diag(gram)) * I`, as a new tensor; a zero Gram becomes `damping * I`."""
    result = gram.clone()
    result.diagonal().copy_(_damped_diagonal(gram.diagonal(), damping))
    return result


def _damped_diagonal(diagonal: Tensor, damping: float) -> Tensor:
    mean = diagonal.mean()
    return diagonal + damping * (mean if mean > 0 else 1.0)


class Decomposition:
    """A weight decomposed once in a metric, to be cut at any rank.

    `weight` is `[out, in]` and is kept by reference. `values` holds all `min(out, in)` singular
    values of `L^T W R`, falling.
    """

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.weight = weight
        self.metric = metric
        out, inner = weight.shape
        self.is_left_form = metric.right is None or (metric.left is not None and out <= inner)
        squares, vectors = torch.linalg.eigh(self._eigenproblem())
        self.vectors = vectors.flip(1)  # [out, out] or [in, in], by falling singular value
        self.values = squares.flip(0).clamp(min=0).sqrt()[: min(out, inner)]
        if self.is_left_form and metric.left is IDENTITY and weight.dtype != torch.float64:
            # Orthonormal factors do not amplify rounding, so float32 is enough for them.
            self.vectors = self.vectors.float()

    def _eigenproblem(self) -> Tensor:
        left, right = self.metric.left, self.metric.right
        if self.is_left_form:
            assert left is not None
            outer = self.metric.outer if right is None else right.sandwich(self.weight)
            assert outer is not None
            return _symmetric(left.times_root(left.times_root(outer.double()).T))
        assert right is not None
        inner = self.metric.inner if left is None else left.sandwich(self.weight.T)
        assert inner is not None
        return _symmetric(right.times_root(right.times_root(inner.double()).T))

    def tails_in(self, metric: Metric) -> Tensor:
        """Squared errors in *another* metric of the cuts made in this one, at every rank from 0 to full, float64.

        `metric` must know the weight from the same side as this decomposition, and no more: the smaller side
        is enough, because a cut is a projection of the weight from there. With t for the vectors that a cut
        leaves out, the left form has `W - Ŵ = Y_t Z_t^T W` with `Y = L^-T U`, `Z = L U`, and so the error
        `tr(G' (W - Ŵ) H' (W - Ŵ)^T) = sum_ij (Y_t^T G' Y_t)_ij (Z_t^T W H' W^T Z_t)_ij`. The right form is its
        mirror image: `W - Ŵ = W Z_t Y_t^T` with `Y = R^-T V`, `Z = R V`, and `H'` and `W^T G' W`.
        """
        if self.is_left_form:
            own, side = self.metric.left, metric.left
            pulled = metric.outer if metric.right is None else metric.right.sandwich(self.weight)
        else:
            own, side = self.metric.right, metric.right
            pulled = metric.inner if metric.left is None else metric.left.sandwich(self.weight.T)
        assert own is not None
        assert side is not None
        assert pulled is not None
        y, z = own.times_root_inverse(self.vectors.T), own.times_root_transposed(self.vectors.T)  # transposed
        terms = side.sandwich(y) * (z @ pulled @ z.T)
        tails = terms.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # sums over the trailing squares
        return torch.cat([tails, tails.new_zeros(1)])[: len(self.values) + 1]

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(basis [rank, in], coefficients [out, rank])` of the best cut, in the weight's dtype.

        The columns of `coefficients` are orthonormal, so that rounding the factors to a narrow
        dtype adds no more error than rounding the weight.
        """
        vectors = self.vectors[:, :rank]
        if self.is_left_form and self.metric.left is IDENTITY:
            weight = self.weight.to(vectors.dtype)
            return (vectors.T @ weight).to(self.weight.dtype), vectors.to(self.weight.dtype)
        if self.is_left_form:
            assert self.metric.left is not None
            coefficients = self.metric.left.times_root_inverse(vectors.T).T  # L^-T U
            basis = (self.metric.left.times_root(self.weight.T) @ vectors).T  # U^T L^T W
        else:
            assert self.metric.right is not None
            basis = self.metric.right.times_root_inverse(vectors.T)
            coefficients = self.weight.double() @ self.metric.right.times_root_transposed(vectors.T).T
            if self.metric.left is IDENTITY:  # U S already, up to rounding: only its columns' lengths are left to share
                lengths = coefficients.norm(dim=0).clamp(min=torch.finfo(coefficients.dtype).tiny)
                factors = basis * lengths[:, None], coefficients / lengths
                return factors[0].to(self.weight.dtype), factors[1].to(self.weight.dtype)
        coefficients, triangle = torch.linalg.qr(coefficients)
        return (triangle @ basis).to(self.weight.dtype), coefficients.to(self.weight.dtype)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def break_even_rank(out_features: int, in_features: int) -> int:
    """Largest rank at which a pair of factors costs no more than the dense weight."""
    return out_features * in_features // (out_features + in_features)
