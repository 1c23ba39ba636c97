"""Sequential update: coefficients are fitted anew layer after layer, each to what the layers before now feed it."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import final

import torch

from eckart.errors import OptionError
from eckart.linalg import DAMPING
from eckart.model.walk import split_batches
from eckart.refiners._block_factors import factors_of, plain_pairs, put_
from eckart.refiners._block_work import BlockWork
from eckart.refiners._two_streams import AtBlock, two_streams
from eckart.refiners.base import Refinement, Refiner
from eckart.refiners.refit_coefficients import coefficient_change
from eckart.storages import FactorizedLayer


@final
@dataclass(frozen=True)
class SequentialUpdate(Refiner):
    """Minimises `||(W - C B) X'||_F` over C in the order of the forward pass (SVD-LLM, arXiv 2403.07378, sec. 3.2).

    Unlike `refit_coefficients`, which takes all X' from one run before any change, each X' already
    passed the updated layers before it. `damping` holds the coefficients to their old values.
    """

    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise OptionError(f"sequential_update.damping is {self.damping:g}, but must be positive.")

    @torch.no_grad()
    def refine_(self, refinement: Refinement) -> None:
        finished = BlockWork(refinement, "sequential_update", asdict(self))
        changeable = plain_pairs(refinement)
        for here in two_streams(refinement, split_batches(refinement.windows), stage="update"):
            if finished.restore_(here.index, here.block) is None:
                self._update(refinement, here, changeable)
                changed = [target for target in here.targets if target.name in changeable]
                finished.write(here.index, factors_of(here.block, changed), {})

    def _update(self, refinement: Refinement, here: AtBlock, changeable: Collection[str]) -> None:
        everything = range(len(here.compressed.batches))
        for stage in here.stages():
            chosen = [target for target in stage if target.name in changeable]
            if not chosen:
                continue
            grams = here.input_grams(chosen, everything)
            for target in chosen:
                layer = here.block.get_submodule(target.place)
                assert isinstance(layer, FactorizedLayer)
                basis, coefficients = layer.basis.weight, layer.coefficients.weight
                weight = refinement.dense_weights[target.name]
                residual = weight.double() - coefficients.double() @ basis.double()
                change = coefficient_change(residual, basis.double(), grams[target.place].matrix, self.damping)
                put_(here.block, {target.place: (basis, coefficients + change.to(coefficients.dtype))})
