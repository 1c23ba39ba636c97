"""What is learned when the linears of a block are compressed together: three forms of the same factors.

- `Whitenings`: the root S of each matrix, a truncated decomposition at every step (LC-SVD as published).
- `Subspaces`: the output subspaces that those decompositions pick, without decomposing (Grassmann manifold).
- `FreeFactors`: both factors on their own; can express more, and is tied to the weight by nothing.

The first two leave coefficients Q with orthonormal columns and basis `Q^T W`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.linalg import damped
from eckart.maths.subspace import ProjectedAdam, orthonormal, top_subspace

BlockFactors = dict[str, tuple[Tensor, Tensor]]  # kind -> basis [rank, in], coefficients [out, rank]

BETAS = (0.9, 0.95)


class BlockForm(ABC):
    """The learned state of one block's factorised linears, by their kind, with its optimiser."""

    @abstractmethod
    def factors(self) -> BlockFactors:
        """The factors of the present state; gradients flow from them to what is learned."""

    @abstractmethod
    def leaves(self) -> list[Tensor]:
        """The tensors that are learned."""

    @abstractmethod
    def step(self, rate: float) -> None:
        """One descent step with the gradients at the leaves."""

    def descend(self, rate: float, clip: float) -> None:
        """Clip the common norm of all gradients, step, and forget the gradients."""
        leaves = self.leaves()
        for leaf in leaves:
            if leaf.grad is None:  # of an expert that no token of the batch reached
                leaf.grad = torch.zeros_like(leaf)
        torch.nn.utils.clip_grad_norm_(leaves, clip)
        self.step(rate)
        for leaf in leaves:
            leaf.grad = None


class Subspaces(BlockForm):
    """`points[kind]` is orthonormal `[out, rank]`, `weights[kind]` the dense `[out, in]`.

    A decomposition of `W S` picks a subspace of the column space of W. A tall W does not span all outputs,
    so its point is held as `Q = frame q`, with `frame` `[out, in]` an orthonormal basis of that space and
    q `[in, rank]`: the same set of factors as `Whitenings`, and fewer numbers to move.
    """

    def __init__(self, weights: Mapping[str, Tensor], points: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.frames = {kind: _frame(weight) for kind, weight in weights.items()}
        self.points = {}
        for kind, point in points.items():
            frame = self.frames[kind]
            inside = precise(point) if frame is None else frame.T @ precise(point)
            self.points[kind] = orthonormal(inside).requires_grad_()
        self.adam = ProjectedAdam(list(self.points.values()), BETAS)

    def factors(self) -> BlockFactors:
        factors = {}
        for kind, point in self.points.items():
            frame = self.frames[kind]
            factors[kind] = tied(point if frame is None else frame @ point, self.weights[kind])
        return factors

    def leaves(self) -> list[Tensor]:
        return list(self.points.values())

    def step(self, rate: float) -> None:
        self.adam.step(rate)


def _frame(weight: Tensor) -> Tensor | None:
    """An orthonormal basis `[out, in]` of the columns of a tall weight; None where it is the identity."""
    return orthonormal(precise(weight)) if weight.shape[0] > weight.shape[1] else None


@dataclass(frozen=True)
class Start:
    """Where a whitening begins: the input Gram `[in, in]` and the rank."""

    gram: Tensor
    rank: int


class Whitenings(BlockForm):
    """`S = S_0 (I + D)`, `S_0` the Cholesky factor of the damped input Gram, D lower triangular from zero.

    So S stays invertible near its start and a step of D is a relative one.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], starts: Mapping[str, Start], damping: float, softening: float
    ) -> None:
        self.weights, self.softening = weights, softening
        self.ranks = {kind: start.rank for kind, start in starts.items()}
        self.roots = {kind: torch.linalg.cholesky(damped(start.gram, damping)) for kind, start in starts.items()}
        self.moves = {kind: torch.zeros_like(root).requires_grad_() for kind, root in self.roots.items()}
        self.adam = torch.optim.Adam(list(self.moves.values()), betas=BETAS)

    def factors(self) -> BlockFactors:
        factors = {}
        for kind, root in self.roots.items():
            weight = self.weights[kind]
            whitening = root + root @ self.moves[kind].tril()
            point = top_subspace(whitening, weight, self.ranks[kind], self.softening)
            factors[kind] = tied(point, weight)
        return factors

    def leaves(self) -> list[Tensor]:
        return list(self.moves.values())

    def step(self, rate: float) -> None:
        _step(self.adam, rate)


class FreeFactors(BlockForm):
    """Basis and coefficients, each on its own, from a given start."""

    def __init__(self, start: BlockFactors) -> None:
        self.pairs = {
            kind: (precise(basis).clone().requires_grad_(), precise(coefficients).clone().requires_grad_())
            for kind, (basis, coefficients) in start.items()
        }
        self.dtypes = {kind: basis.dtype for kind, (basis, _) in start.items()}
        self.adam = torch.optim.Adam(self.leaves(), betas=BETAS)

    def factors(self) -> BlockFactors:
        return {kind: (b.to(self.dtypes[kind]), c.to(self.dtypes[kind])) for kind, (b, c) in self.pairs.items()}

    def leaves(self) -> list[Tensor]:
        return [leaf for pair in self.pairs.values() for leaf in pair]

    def step(self, rate: float) -> None:
        _step(self.adam, rate)


def tied(point: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Basis `Q^T W` and coefficients Q in the dtype of W, for `point` Q `[out, rank]`."""
    return (point.T @ weight.to(point.dtype)).to(weight.dtype), point.to(weight.dtype)


def precise(tensor: Tensor) -> Tensor:
    """Detached, in float32 at least: what is learned must not lose its small steps to rounding."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _step(adam: torch.optim.Optimizer, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
