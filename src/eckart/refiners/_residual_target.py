"""Pure maths: the best low-rank layer for a given target, in closed form.

Where `linalg` approximates a weight on its own inputs, here the layer reads inputs Z `[in, tokens]` and
shall give targets T `[out, tokens]`, which may come from elsewhere: from the dense model (anchored,
arXiv 2604.02119), or from what is still missing in the residual stream (the block's dense output less
what the compressed block adds before this layer). Computed in float64.
"""

import torch
from torch import Tensor

from eckart.linalg import DAMPING, Decomposition, Metric, Side, damped


def blend(own: Tensor, target: Tensor, share: float) -> Tensor:
    """`(1 - share) own + share target`: a target bounded by the layer's own outputs.

    Both are cross products with the inputs, `[out, in]`. The full residual target over-corrects
    (SAES-SVD, arXiv 2602.03051, holds its weight in [0.25, 0.75]).
    """
    return (1 - share) * own + share * target


def regress(weight: Tensor, cross: Tensor, gram: Tensor, rank: int, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """`(basis [rank, in], coefficients [out, rank])` that minimise `||T - C B Z||_F` over rank `rank`.

    `cross` is `T Z^T` `[out, in]`, `gram` is `Z Z^T` `[in, in]`; T itself is not needed. With
    `L = T Z^T G^-1` the unrestricted least squares and Q the top eigenvectors of `L G L^T`, the answer is
    `Q Q^T L` (`[C S^-T]_r S^-1` for any root S of the Gram). `damping` times the mean diagonal of the
    Gram holds directions that the data hardly visit to `weight` `[out, in]`.
    """
    weight, gram = weight.double(), gram.double()
    missing = cross.double() - weight @ gram
    solution = weight + torch.linalg.solve(damped(gram, damping), missing.T).T
    return Decomposition(solution, Metric(right=Side(gram=gram, damping=damping))).truncate(rank)
