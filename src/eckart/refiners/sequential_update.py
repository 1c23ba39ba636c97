"""Sequential update: coefficients are fitted anew layer after layer, each to what the layers before now feed it."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import nn

from eckart.block_factors import factors_of, plain_pairs, put_
from eckart.block_work import BlockWork
from eckart.blocks import split_batches
from eckart.errors import OptionError
from eckart.linalg import DAMPING
from eckart.linear import FactorizedLinear
from eckart.progress import track
from eckart.refiners.base import Refinement, Refiner
from eckart.refiners.refit_coefficients import correction
from eckart.sweep import BATCH_TOKENS
from eckart.two_streams import TwoStreams, input_gram, stages
from eckart.types import Target


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
    def refine_(self, work: Refinement) -> None:
        finished = BlockWork(work, "sequential_update", asdict(self))
        blocks, able = work.layout.block_list(work.model), plain_pairs(work)
        streams = TwoStreams.open(work.model, blocks, split_batches(work.windows, BATCH_TOKENS))
        for index, block in track(enumerate(blocks), "update", len(blocks), work.progress):
            if finished.restore_(index, block) is None:
                targets = [target for target in work.layout.targets if target.block == index]
                self._update(work, streams, block, targets, able)
                changed = [target for target in targets if target.name in able]
                finished.keep(index, factors_of(block, changed), {})
            streams.advance(block)

    def _update(
        self,
        work: Refinement,
        streams: TwoStreams,
        block: nn.Module,
        targets: Sequence[Target],
        able: Collection[str],
    ) -> None:
        everything = range(len(streams.compressed))
        for stage in stages(streams, block, targets):
            chosen = [target for target in stage if target.name in able]
            if not chosen:
                continue
            gram = input_gram(streams, block, chosen[0], everything)
            for target in chosen:
                layer = block.get_submodule(target.kind)
                assert isinstance(layer, FactorizedLinear)
                basis, coefficients = layer.basis.weight, layer.coefficients.weight
                weight = work.dense_weights[target.name]
                residual = weight.double() - coefficients.double() @ basis.double()
                change = correction(residual, basis.double(), gram.matrix, self.damping)
                put_(block, {target.kind: (basis, coefficients + change.to(coefficients.dtype))})
