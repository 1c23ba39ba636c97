"""Pure maths of output subspaces: what a learned whitening can reach, its gradient, and the Grassmann form.

A truncated decomposition of `W S` with any invertible S is a projection of the outputs (methods of
LC-SVD, ICLR 2026 submission 6575, as reconstructed in `docs/methods/lc-svd.md`):

    [W S]_r S^-1 = Q Q^T W,   Q = top-r eigenvectors of (W S)(W S)^T,   Q^T Q = I.

So to learn S is to choose an r-dimensional subspace of the outputs, and the factors are tied:
coefficients Q `[out, rank]`, basis `Q^T W` `[rank, in]`. `top_subspace` goes from S to Q with a
gradient that only the gap across the cut enters; `retract` and `ProjectedAdam` move Q itself.

Unlike `linalg`, which decomposes once, everything here is made to run at every step of a descent.
"""

from typing import Any

import torch
from torch import Tensor

SOFTENING = 1e-3


def top_subspace(root: Tensor, weight: Tensor, rank: int, softening: float = SOFTENING) -> Tensor:
    """Orthonormal Q `[out, rank]`, the top left singular vectors of `weight @ root`; differentiable in `root`.

    `root` is S `[in, in]`, `weight` W `[out, in]` (not differentiated), 1 <= rank <= min(out, in). The
    gradient is exact for losses that depend on Q through `Q Q^T` only, as every loss of the layer
    `Q (Q^T W x)` does. `softening` times the last kept eigenvalue bounds the gaps across the cut from
    below; 0 gives the exact gradient. Computed in float64.
    """
    result: Tensor = _TopSubspace.apply(root, weight, rank, softening)  # type: ignore[no-untyped-call]
    return result


class _TopSubspace(torch.autograd.Function):
    """With `P = Q Q^T`, eigenvalues l_i kept and l_j discarded, `U_n` the discarded vectors:

        E = U_n (F o (U_n^T dLoss/dQ / 2)) Q^T,  F_ji = 1 / (l_i - l_j),  dLoss/dS = 2 W^T (E + E^T) W S.

    `dLoss/dQ / 2 = sym(Gamma W^T) Q` with `Gamma` the gradient of the product, so that no `[out, in]`
    gradient is formed. Gaps among kept or among discarded values do not appear.
    """

    @staticmethod
    def forward(ctx: Any, root: Tensor, weight: Tensor, rank: int, softening: float) -> Tensor:
        weight64 = weight.double()
        product = weight64 @ root.double()
        vectors, energies = _left_vectors(product)
        ctx.save_for_backward(product, weight64, vectors, energies)
        ctx.rank, ctx.softening = rank, softening
        return vectors[:, :rank].to(root.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        product, weight, vectors, energies = ctx.saved_tensors
        kept, discarded = vectors[:, : ctx.rank], vectors[:, ctx.rank :]
        gap = energies[: ctx.rank][None, :] - energies[ctx.rank :][:, None]  # [discarded, kept]
        floor = ctx.softening * energies[ctx.rank - 1]
        inverse_gap = gap / (gap.square() + floor.square()).clamp(min=torch.finfo(gap.dtype).tiny)
        core = inverse_gap * (discarded.T @ gradients[0].double()) / 2
        # 2 W^T (E + E^T) Z with the thin factors taken apart, so that nothing is [out, out].
        left, right = weight.T @ discarded, weight.T @ kept
        gradient = 2 * (left @ (core @ (kept.T @ product)) + right @ (core.T @ (discarded.T @ product)))
        return gradient.to(gradients[0].dtype), None, None, None


def _left_vectors(product: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors `[out, min(out, in)]` and squared singular values, falling, of `[out, in]` float64.

    A tall matrix takes the smaller eigenproblem; its vectors of singular value zero are zero columns,
    which is harmless: they are discarded, and the weight has nothing there.
    """
    out, inner = product.shape
    if out <= inner:
        energies, vectors = torch.linalg.eigh(product @ product.T)
        return vectors.flip(1), energies.flip(0).clamp(min=0)
    energies, right = torch.linalg.eigh(product.T @ product)
    energies, right = energies.flip(0).clamp(min=0), right.flip(1)
    vectors = product @ right
    lengths = vectors.norm(dim=0)
    usable = lengths > lengths[0] * 1e-10
    vectors = torch.where(usable, vectors / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)
    return _orthonormal_where(vectors, usable), energies


def _orthonormal_where(vectors: Tensor, usable: Tensor) -> Tensor:
    """Mend the small loss of orthogonality that dividing by small singular values brings."""
    count = int(usable.sum())
    mended = vectors.clone()
    mended[:, :count] = orthonormal(vectors[:, :count])
    return mended


def orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal `[out, rank]` with the column space of `matrix`, each column near the one it came from.

    A QR decomposition with the signs chosen so that the triangle has a positive diagonal, which makes
    it a continuous function of the matrix: the QR retraction of the Grassmann manifold.
    """
    q, triangle = torch.linalg.qr(matrix)
    signs = triangle.diagonal().sign()
    result: Tensor = q * torch.where(signs == 0, 1.0, signs)
    return result


def tangent(point: Tensor, direction: Tensor) -> Tensor:
    """`(I - Q Q^T) D`: the part of `direction` `[out, rank]` that moves the subspace of `point` `[out, rank]`."""
    return direction - point @ (point.T @ direction)


class ProjectedAdam:
    """Adam on the Grassmann manifold: tangent gradients, moments carried along by projection, QR retraction.

    `points` are orthonormal `[out, rank]` leaves, changed in place. The second moments stay attached
    to the entries of Q, which is sound because `orthonormal` turns Q as little as it can.
    """

    def __init__(self, points: list[Tensor], betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.points, self.betas, self.steps = points, betas, 0
        self.first = [torch.zeros_like(p) for p in points]
        self.second = [torch.zeros_like(p) for p in points]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One descent step with the gradients in `points[i].grad`; `rate` is the change per entry of Q."""
        self.steps += 1
        one, two = self.betas
        scale_one, scale_two = 1 - one**self.steps, 1 - two**self.steps
        for index, point in enumerate(self.points):
            assert point.grad is not None
            gradient = tangent(point, point.grad)
            self.first[index].lerp_(gradient, 1 - one)
            self.second[index].lerp_(gradient.square(), 1 - two)
            move = (self.first[index] / scale_one) / ((self.second[index] / scale_two).sqrt() + 1e-12)
            point.copy_(orthonormal(point - rate * tangent(point, move)))
            self.first[index].copy_(tangent(point, self.first[index]))

    def zero_grad(self) -> None:
        for point in self.points:
            point.grad = None
