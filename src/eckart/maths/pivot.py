"""Pivoted storage: a matrix of rank r in r (m + n - r) numbers, without loss. Tensors in, tensors out.

A pair `A B` spends `r^2` numbers too many, since `A M, M^-1 B` is the same matrix for any invertible
M. Choose M so that r rows of A (the pivots J) become the identity: what is left to store is
`A_J B`, which are rows of the matrix itself, and `A_rest A_J^-1` (PIFA: Zhao et al., arXiv 2501.19090,
sec. 3). The pivots come from a QR decomposition with column pivoting of A^T, then rows are swapped
until no coefficient exceeds a bound (strong rank-revealing QR: Gu and Eisenstat 1996, sec. 3).

Computed in float64 on the CPU.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Pivots = Literal["rows", "columns"]

BOUND = 2.0


@dataclass(frozen=True)
class Pivoted:
    """A matrix `[out, in]` of rank r, pivoted on its rows or on its columns.

    rows: `basis` `[rank, in]` are rows of the matrix, `coefficients` `[out - rank, rank]` make the
    others of them, and output i is entry `index[i]` of `(basis x, coefficients basis x)`.
    columns: `coefficients` `[out, rank]` are columns of the matrix, `basis` `[rank, in - rank]` makes
    the others of them, and `x[index]` are the inputs of the pivot columns, then the others.
    """

    basis: Tensor
    coefficients: Tensor
    index: Tensor
    pivots: Pivots

    def product(self) -> Tensor:
        """The matrix, `[out, in]`."""
        if self.pivots == "rows":
            return torch.cat([self.basis, self.coefficients @ self.basis])[self.index.long()]
        rows = torch.cat([self.coefficients, self.coefficients @ self.basis], dim=1)
        return rows[:, torch.argsort(self.index)]


def default_pivots(out_features: int, in_features: int) -> Pivots:
    """The smaller side: its index is shorter, and less is moved at run time."""
    return "rows" if out_features <= in_features else "columns"


def pivoted(basis: Tensor, coefficients: Tensor, pivots: Pivots | None = None, bound: float = BOUND) -> Pivoted:
    """Pivot the matrix `coefficients @ basis` (`[out, rank]` times `[rank, in]`), in the dtype of `basis`.

    `bound` > 1 limits the size of what `rows` stores as coefficients and `columns` as basis. Raises
    `ValueError` unless rank < min(out, in): a matrix of full rank is stored dense.
    """
    (out_features, rank), in_features = coefficients.shape, basis.shape[1]
    if not 1 <= rank < min(out_features, in_features):
        raise ValueError(
            f"rank is {rank}, but pivoted storage of {out_features} x {in_features} needs a rank in "
            f"[1, {min(out_features, in_features) - 1}]; at full rank store it dense."
        )
    pivots = pivots or default_pivots(out_features, in_features)
    left, right = (_to_numpy(t) for t in (coefficients, basis))
    if pivots == "rows":
        kept, rest, order = _pivot_rows(left, right, bound)
        index, new_basis, new_coefficients = np.argsort(order), kept, rest
    else:
        kept, rest, index = _pivot_rows(right.T, left.T, bound)
        new_basis, new_coefficients = rest.T, kept.T
    return Pivoted(
        torch.from_numpy(np.ascontiguousarray(new_basis)).to(basis),
        torch.from_numpy(np.ascontiguousarray(new_coefficients)).to(coefficients),
        torch.from_numpy(index.astype(np.int32)).to(basis.device),
        pivots,
    )


def unpivoted(matrix: Pivoted) -> tuple[Tensor, Tensor]:
    """The same matrix as a pair `(basis [rank, in], coefficients [out, rank])`, coefficients orthonormal.

    Orthonormal, so that rounding the pair adds no more error than rounding the weight.
    """
    basis, coefficients = matrix.basis.double(), matrix.coefficients.double()
    identity = torch.eye(basis.shape[0], dtype=torch.float64, device=basis.device)
    if matrix.pivots == "rows":
        coefficients = torch.cat([identity, coefficients])[matrix.index.long()]
    else:
        basis = torch.cat([identity, basis], dim=1)[:, torch.argsort(matrix.index)]
    orthonormal, triangle = torch.linalg.qr(coefficients)
    return (triangle @ basis).to(matrix.basis), orthonormal.to(matrix.coefficients)


def _to_numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.detach().double().cpu().numpy()
    return array


def _pivot_rows(left: Floats, right: Floats, bound: float) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """`(pivot rows of left @ right, coefficients of the other rows, order)`; order: pivots, then the others."""
    # Orthonormal columns have full rank even where `left` has not, so that its pivot rows can be solved with.
    orthonormal, triangle = np.linalg.qr(left)
    order, coefficients = interpolate(orthonormal, bound)
    return orthonormal[order[: left.shape[1]]] @ (triangle @ right), coefficients, order


def interpolate(rows: Floats, bound: float = BOUND) -> tuple[NDArray[np.int64], Floats]:
    """Choose r of the rows `[m, r]` (of full column rank) and write the others as combinations of them.

    Returns `(order [m], coefficients [m - r, r])` with `rows[order[r:]] = coefficients @ rows[order[:r]]`
    and no coefficient above `bound` in magnitude.
    """
    rank = rows.shape[1]
    triangle, order = scipy.linalg.qr(rows.T, mode="r", pivoting=True, check_finite=False)
    order = order.astype(np.int64)
    coefficients: Floats = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:]).T
    swapped = False
    while True:
        i, j = np.unravel_index(int(np.abs(coefficients).argmax()), coefficients.shape)
        if abs(coefficients[i, j]) <= bound:
            break
        _swap_(coefficients, int(i), int(j))  # the volume of the pivot rows grows by more than `bound`, so this ends
        order[[rank + i, j]] = order[[j, rank + i]]
        swapped = True
    if swapped:  # once more from the rows, without the rounding of the swaps
        coefficients = np.linalg.solve(rows[order[:rank]].T, rows[order[rank:]].T).T
    return order, coefficients


def _swap_(coefficients: Floats, i: int, j: int) -> None:
    """Let row i and pivot j change places, in place: a rank-one update."""
    row, value = coefficients[i].copy(), coefficients[i, j]
    column = coefficients[:, j] / value
    coefficients -= np.outer(column, row)
    coefficients[:, j] = column
    coefficients[i] = -row / value
    coefficients[i, j] = 1 / value
