"""Refit: every basis stays, all coefficients are fitted anew to what the compressed model feeds them."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from eckart.errors import NumericalError, OptionError
from eckart.linalg import DAMPING
from eckart.refiners.base import Refinement, Refiner
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.storages import FactorizedLayer, find


@final
@dataclass(frozen=True)
class RefitCoefficients(Refiner):
    """Minimises `||(W - C B) X'||_F` over C with X' the inputs in the compressed model (D-Rank, arXiv 2509.25622).

    One shot, as in Basis Sharing (arXiv 2410.03765): all X' come from one run of the model as it was
    before any refit. Each member of a group is fitted to its own inputs. It runs when at least
    `min_removed` of the parameters are gone; below, the papers do not update. `damping` times the
    mean diagonal of `B X'X'^T B^T` holds the coefficients to their old values.
    """

    min_removed: float = 0.4
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not 0 <= self.min_removed <= 1:
            raise OptionError(f"refit_coefficients.min_removed is {self.min_removed:g}, but must lie in [0, 1].")
        if not self.damping > 0:
            raise OptionError(f"refit_coefficients.damping is {self.damping:g}, but must be positive.")

    def applies(self, keep: float) -> bool:
        return keep <= 1 - self.min_removed + 1e-9

    @torch.no_grad()
    def refine_(self, refinement: Refinement) -> None:
        # The sweep has taken a block's outputs before it yields the block, so a refit here reaches no later X'.
        for per_block in sweep(
            refinement.model, refinement.layout, refinement.windows, (Need.INPUT_GRAM,), progress=refinement.progress
        ):
            for name, statistics in per_block.items():
                layer = refinement.model.get_submodule(name)
                if isinstance(layer, FactorizedLayer) and name in refinement.dense_weights:
                    assert statistics.input_gram is not None
                    residual = refinement.dense_weights[name].double() - layer.weight.double()
                    gram = statistics.input_gram.matrix
                    change = coefficient_change(residual, whole_basis(layer).double(), gram, self.damping)
                    if not torch.isfinite(change).all():
                        raise NumericalError(f"{name}: NaN or infinity in its refitted coefficients.")
                    layer.coefficients.weight.copy_(layer.coefficients.weight.double() + change)


def coefficient_change(residual: Tensor, basis: Tensor, gram: Tensor, damping: float) -> Tensor:
    """`(W - Ŵ) G B^T (B G B^T + d I)^-1` `[out, rank]`, what to add to the coefficients for the least squares.

    `residual` is W - Ŵ `[out, in]`, `basis` B `[rank, in]`, `gram` G `[in, in]`, all float64.
    """
    cross = gram @ basis.T  # [in, rank]
    inner = basis @ cross
    mean = inner.diagonal().mean()
    inner.diagonal().add_(damping * (mean if mean > 0 else 1.0))
    change: Tensor = torch.linalg.solve(inner, (residual @ cross).T).T
    return change


def whole_basis(layer: FactorizedLayer) -> Tensor:
    """The basis over all inputs, `[rank, in]`: zero at preserved columns, which stay as they are."""
    pair = find(layer.spec()["storage"]).to_pair(layer)
    if pair.kept_index is None:
        return pair.basis
    rest = torch.ones(layer.in_features, dtype=torch.bool, device=pair.basis.device)
    rest[pair.kept_index] = False
    wide = pair.basis.new_zeros(layer.rank, layer.in_features)
    wide[:, rest] = pair.basis
    return wide
