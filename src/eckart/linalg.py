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
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    values of `L^T W R`, falling. Of the metric only what a cut needs is kept, in two matrices of the smaller side:
    a cut is a projection of the weight from there. With `U` the vectors of the eigenproblem, the left form has
    `Ŵ = Y_r Z_r^T W` with `Y = L^-T U` and `Z = L U`; the right form is its mirror image, `Ŵ = W Z_r Y_r^T` with
    `Y = R^-T V` and `Z = R V`. Where that side of the metric is the identity, both are `U` and held once.
    """

    def __init__(self, weight: Tensor, metric: Metric) -> None:
        self.weight = weight
        out, inner = weight.shape
        self.is_left_form = metric.right is None or (metric.left is not None and out <= inner)
        squares, vectors = torch.linalg.eigh(_eigenproblem(weight, metric, self.is_left_form))
        vectors = vectors.flip(1)  # by falling singular value
        self.values = squares.flip(0).clamp(min=0).sqrt()[: min(out, inner)]
        side = metric.left if self.is_left_form else metric.right
        assert side is not None
        self.is_orthonormal = side is IDENTITY
        self.has_plain_outputs = metric.left is IDENTITY
        self._held: tuple[Tensor, ...] | Path = (vectors,)
        if not self.is_orthonormal:
            self._held = (side.times_root_inverse(vectors.T).T, side.times_root_transposed(vectors.T).T)

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """`(Y, Z)`, each of the smaller side's size squared."""
        if isinstance(self._held, Path):
            stored = load_file(self._held)
            matrices = tuple(stored[str(i)].to(self.weight.device) for i in range(len(stored)))
        else:
            matrices = self._held
        return matrices[0], matrices[-1]

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """`(B [full, in], A [out, full])`, float64, of which the first r rows and columns are the cut at rank r.

        `A^T G A` is the identity and `B H B^T` holds the squares of `values` on its diagonal.
        """
        y, z = (matrix[:, : len(self.values)].double() for matrix in self.projections)
        if self.is_left_form:
            return z.T @ self.weight.double(), y
        lengths = self.values.to(y).clamp(min=1e-300)
        return y.T * lengths[:, None], self.weight.double() @ z / lengths

    def close(self) -> None:
        """Keep what cuts need in the weight's own precision (float32 at least), which is half of the memory.

        Cuts are rounded to that precision in the end; predictions from `tails_in` are made before.
        """
        assert not isinstance(self._held, Path)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self._held = tuple(matrix.to(dtype) for matrix in self._held)

    def spill(self, path: Path) -> None:
        """Move them to a file, from where each cut reads them back."""
        assert not isinstance(self._held, Path)
        save_file({str(i): matrix.cpu().contiguous() for i, matrix in enumerate(self._held)}, path)
        self._held = path

    def tails_in(self, metric: Metric) -> Tensor:
        """Squared errors in *another* metric of the cuts made in this one, at every rank from 0 to full, float64.

        `metric` must know the weight from the same side as this decomposition, and no more: the smaller side
        is enough. With t for the vectors that a cut leaves out, the left form has `W - Ŵ = Y_t Z_t^T W`, and so the
        error `tr(G' (W - Ŵ) H' (W - Ŵ)^T) = sum_ij (Y_t^T G' Y_t)_ij (Z_t^T W H' W^T Z_t)_ij`. The right form is its
        mirror image, with `H'` and `W^T G' W`.
        """
        if self.is_left_form:
            side = metric.left
            pulled = metric.outer if metric.right is None else metric.right.sandwich(self.weight)
        else:
            side = metric.right
            pulled = metric.inner if metric.left is None else metric.left.sandwich(self.weight.T)
        assert side is not None
        assert pulled is not None
        y, z = (matrix.T.double() for matrix in self.projections)
        terms = side.sandwich(y) * (z @ pulled @ z.T)
        tails = terms.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # sums over the trailing squares
        return torch.cat([tails, tails.new_zeros(1)])[: len(self.values) + 1]

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(basis [rank, in], coefficients [out, rank])` of the best cut, in the weight's dtype.

        The columns of `coefficients` are orthonormal, so that rounding the factors to a narrow
        dtype adds no more error than rounding the weight.
        """
        dtype = self.weight.dtype
        y, z = (matrix[:, :rank] for matrix in self.projections)
        if self.is_left_form and self.is_orthonormal:  # orthonormal factors do not amplify rounding
            exact = torch.promote_types(dtype, torch.float32)
            return (z.to(exact).T @ self.weight.to(exact)).to(dtype), y.to(dtype)
        y, z, weight = y.double(), z.double(), self.weight.double()
        if self.is_left_form:
            coefficients, basis = y, z.T @ weight
        else:
            coefficients, basis = weight @ z, y.T
            if self.has_plain_outputs:  # U S already, up to rounding: only its columns' lengths are left to share
                lengths = coefficients.norm(dim=0).clamp(min=torch.finfo(coefficients.dtype).tiny)
                return (basis * lengths[:, None]).to(dtype), (coefficients / lengths).to(dtype)
        coefficients, triangle = torch.linalg.qr(coefficients)
        return (triangle @ basis).to(dtype), coefficients.to(dtype)


def _eigenproblem(weight: Tensor, metric: Metric, is_left_form: bool) -> Tensor:
    """The symmetric matrix whose eigenvalues are the squared singular values of `L^T W R`, of the form's side."""
    left, right = metric.left, metric.right
    if is_left_form:
        assert left is not None
        outer = metric.outer if right is None else right.sandwich(weight)
        assert outer is not None
        return _symmetric(left.times_root(left.times_root(outer.double()).T))
    assert right is not None
    inner = metric.inner if left is None else left.sandwich(weight.T)
    assert inner is not None
    return _symmetric(right.times_root(right.times_root(inner.double()).T))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def break_even_rank(out_features: int, in_features: int) -> int:
    """Largest rank at which a pair of factors costs no more than the dense weight."""
    return out_features * in_features // (out_features + in_features)
