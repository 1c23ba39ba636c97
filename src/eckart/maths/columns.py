"""Preserved columns, the maths: some input columns of a weight stay exact, the others get a low rank.

For kept columns S and remaining columns R, with the input Gram H, two ways:

- faithful (Duo-SVD, arXiv 2510.19385 v2, step 3b): the kept columns are the weight's own, and
  `W_R` is decomposed in the metric `H_RR`.
- compensated: both parts are fitted together. For a fixed low-rank part L the best strip is
  `A = W_S + (W_R - L) H_RS H_SS^-1`, and L is the truncation of `W_R` in the Schur complement
  `H_RR - H_RS H_SS^-1 H_SR`. The faithful pair is one candidate of this problem, so its error is
  never smaller at the same columns and rank.

One Cholesky factor serves every split of one column order. With the kept columns first,
`Y = W chol(H)` holds the compensated remainder of every split in its trailing columns; with the kept
columns last, the leading block of `chol(H)` is the root of `H_RR`. So the error of a split costs the
eigenvalues, without vectors, of a matrix of size `min(out, in - kept)` made by an update. Float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg import Decomposition, Metric, Side


def column_scores(residual: Tensor, gram: Tensor) -> Tensor:
    """`||E_j||^2 H_jj` of each column, `[in]`: what column j of the residual `[out, in]` does to the output.

    The square of v1's printed score `||E_{:,j} X_{j,:}||_F`; the order is the same.
    """
    return residual.double().square().sum(0) * gram.diagonal()


def positive_definite(gram: Tensor) -> Tensor:
    """`gram` itself if it has a Cholesky factor, else with the least of 1e-6, 1e-5, ... of its mean diagonal added.

    A Gram of float32 products may miss being positive definite by rounding although it was damped.
    Raises `RuntimeError` when a tenth of the mean does not help.
    """
    mean = gram.diagonal().mean()
    for extra in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        tried = gram + extra * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if extra else gram
        if int(torch.linalg.cholesky_ex(tried).info) == 0:
            return tried
    raise RuntimeError("not positive definite")


def kept_for(given_up: int, rank: int, out_features: int, in_features: int) -> int:
    """Columns that `given_up` of `rank` ranks pay for: `c = d (out + in) / (out - (rank - d))`, rounded down.

    From `out * c + (rank - d) * (out + in - c) = rank * (out + in)`. (The release rounds to nearest, and
    can then spend more than the pair; see `docs/decisions/0020-preserved-columns.md`.)
    """
    rest = rank - given_up
    if given_up == 0 or out_features <= rest:
        return 0
    return min(given_up * (out_features + in_features) // (out_features - rest), in_features - rest)


class Splits:
    """All splits of one weight `[out, in]` for one order of its columns, most wanted first.

    `gram` is `[in, in]`, float64, positive definite (`positive_definite`).
    """

    def __init__(self, weight: Tensor, gram: Tensor, order: Tensor, compensated: bool) -> None:
        self.compensated = compensated
        self.order = order if compensated else order.flip(0)  # the kept columns first, or last
        self.weight: Tensor = weight.double()[:, self.order]
        self.gram: Tensor = gram[self.order][:, self.order]
        self.root: Tensor = torch.linalg.cholesky(self.gram)
        self.is_left_form = weight.shape[0] <= weight.shape[1]
        if compensated:
            self.image: Tensor = self.weight @ self.root  # [out, in]; the remainder of a split is its tail
            product: Tensor = self.image @ self.image.T if self.is_left_form else self.image.T @ self.image
        elif self.is_left_form:
            self.reach: Tensor = self.gram @ self.weight.T  # [in, out]
            product = self.weight @ self.reach
        else:
            product = self.weight.T @ self.weight
        self.product: Tensor = product

    def squared_error(self, rank: int, kept: int) -> float:
        """Least squared error in the metric with `kept` columns kept and `rank` ranks for the others."""
        problem = self._compensated_problem(kept) if self.compensated else self._faithful_problem(kept)
        values = torch.linalg.eigvalsh((problem + problem.T) / 2)  # rising
        return float(values[: max(0, len(values) - rank)].clamp(min=0).sum())

    def _compensated_problem(self, kept: int) -> Tensor:
        if self.is_left_form:
            head = self.image[:, :kept]
            problem: Tensor = self.product - head @ head.T
            return problem
        return self.product[kept:, kept:]

    def _faithful_problem(self, kept: int) -> Tensor:
        rest = len(self.order) - kept
        problem: Tensor
        if self.is_left_form:
            strip = self.weight[:, rest:]
            cross = strip @ self.reach[rest:]
            problem = self.product - cross - cross.T + strip @ self.gram[rest:, rest:] @ strip.T
        else:
            root = self.root[:rest, :rest]
            problem = root.T @ self.product[:rest, :rest] @ root
        return problem


@dataclass(frozen=True)
class Split:
    """A carried out split: `coefficients @ basis` for the remaining columns, `kept` for the kept ones.

    `kept_index` `[kept]` is rising and `basis` `[rank, in - kept]` follows the others in their order.
    """

    basis: Tensor
    coefficients: Tensor
    kept_index: Tensor
    kept: Tensor


def split(weight: Tensor, gram: Tensor, kept_index: Tensor, rank: int, compensated: bool) -> Split:
    """Factors and strip of one choice of columns, in the weight's dtype; the best of its kind."""
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    is_kept[kept_index] = True
    kept_index, rest_index = is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]
    strip, rest = weight[:, kept_index], weight[:, rest_index]
    metric = gram[rest_index][:, rest_index]
    if not compensated:
        basis, coefficients = _decompose(rest, metric).truncate(rank)
        return Split(basis, coefficients, kept_index, strip)
    cross = gram[kept_index][:, rest_index]  # [kept, rest]
    root = torch.linalg.cholesky(gram[kept_index][:, kept_index])
    whitened = torch.linalg.solve_triangular(root, cross, upper=False)
    basis, coefficients = _decompose(rest.double(), metric - whitened.T @ whitened).truncate(rank)
    unexplained = (rest.double() - coefficients @ basis) @ cross.T  # [out, kept]
    strip = strip.double() + torch.cholesky_solve(unexplained.T, root).T
    return Split(basis.to(weight.dtype), coefficients.to(weight.dtype), kept_index, strip.to(weight.dtype))


def _decompose(weight: Tensor, gram: Tensor) -> Decomposition:
    return Decomposition(weight, Metric(right=Side(gram=gram, damping=0.0)))
