"""Alternating: closed-form regressions against the block's output, matrix after matrix; no gradient."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from eckart.errors import NumericalError, OptionError
from eckart.linalg import DAMPING
from eckart.model.operators import operator
from eckart.model.recorder import Recorder
from eckart.refiners._block_descent import BlockError
from eckart.refiners._block_factors import factors_of, has_unseen, put_, refinable, split_windows
from eckart.refiners._block_work import BlockWork
from eckart.refiners._residual_target import blend, regress
from eckart.refiners._two_streams import AtBlock, two_streams
from eckart.refiners.base import Refinement, Refiner
from eckart.storages import FactorizedLayer
from eckart.types import Target

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Alternating(Refiner):
    """A gradient-free stand-in for `block_collaborative` (the closed-form pieces of LC-SVD as reconstructed).

    In forward order, each matrix is decomposed anew for what it now reads. One that writes to the
    residual stream (as wide as the stream, with an input of its own: o and down) is regressed on a blend:
    its own dense outputs and, with weight `share`, what the block's output still lacks. A step that does
    not lower the block's output error on what is held out is undone. `sweeps` times; `held_out`, `target` and `batch`
    as in `block_collaborative`: without text that no statistic has seen, every matrix is first decomposed on the
    training windows alone, and that is what steps are compared with.
    """

    target: Literal["anchored", "same_input"] = "anchored"
    sweeps: int = 2
    share: float = 0.5
    batch: int = 8
    held_out: float = 0.1
    damping: float = DAMPING

    def __post_init__(self) -> None:
        for name in ("sweeps", "batch", "damping"):
            if not getattr(self, name) > 0:
                raise OptionError(f"alternating.{name} is {getattr(self, name):g}, but must be positive.")
        if not 0 <= self.share <= 1:
            raise OptionError(f"alternating.share is {self.share:g}, but must lie in [0, 1].")
        if not 0 < self.held_out < 1:
            raise OptionError(f"alternating.held_out is {self.held_out:g}, but must lie in (0, 1).")

    @torch.no_grad()
    def refine_(self, refinement: Refinement) -> None:
        batches, train, held_out = split_windows(refinement.windows, self.batch, self.held_out, refinement.unseen)
        finished, changeable = BlockWork(refinement, "alternating", asdict(self)), refinable(refinement)
        for here in two_streams(refinement, batches, stage="alternate"):
            aims = here.aims(refinement.dense_weights, self.target)
            notes = finished.restore_(here.index, here.block)
            if notes is None:
                notes = self._regress(refinement, here, changeable, aims, (train, held_out))
                changed = [target for target in here.targets if target.name in changeable]
                finished.write(here.index, factors_of(here.block, changed), notes)
            refinement.notes.append(notes)

    def _regress(
        self,
        refinement: Refinement,
        here: AtBlock,
        changeable: Collection[str],
        aims: Sequence[Tensor],
        split: tuple[Sequence[int], Sequence[int]],
    ) -> dict[str, Any]:
        """Try every step on one block, keep those that gain, and return its notes.

        `split` has the numbers of the batches that train and of those that are held out.
        """
        train, held_out = split
        error = BlockError(here, aims)
        before = error.over({}, held_out)
        if not before < torch.inf:
            raise NumericalError(f"block {here.index}: its output holds NaN or infinity before any step.")
        if not has_unseen(refinement):  # what is in place has seen what judges it
            for stage in here.stages():
                self._step(refinement, here, [target for target in stage if target.name in changeable], train)
            before = error.over({}, held_out)
        lowest = before
        kept = tried = 0
        for stage in here.stages() * self.sweeps:
            # An expert does not see every token, so what it would have to give to reach the aims is not told by them.
            chosen = [target for target in stage if target.name in changeable and target.expert is None]
            if not chosen:
                continue
            old, tried = factors_of(here.block, chosen), tried + 1
            writes = len(stage) == 1 and stage[0].out_features == aims[0].shape[-1]
            self._step(refinement, here, chosen, train, aims if writes and self.share > 0 else None)
            now = error.over({}, held_out)
            if now < lowest:
                lowest, kept = now, kept + 1
            else:
                put_(here.block, old)
        return _notes(here.index, before, lowest, kept, tried)

    def _step(
        self,
        refinement: Refinement,
        here: AtBlock,
        chosen: Sequence[Target],
        train: Sequence[int],
        aims: Sequence[Tensor] | None = None,
    ) -> None:
        """Regress matrices that read the same on it; with `aims`, on what the block's output lacks of them, too."""
        if not chosen:
            return
        gram = here.input_gram(chosen[0], train).matrix
        for target in chosen:
            weight, layer = refinement.dense_weights[target.name], here.block.get_submodule(target.place)
            assert isinstance(layer, FactorizedLayer)
            cross = weight.double() @ gram
            if aims is not None:
                cross = blend(cross, missing_cross(here, target, aims, train), self.share)
            basis, coefficients = regress(weight, cross, gram, layer.rank, self.damping)
            put_(here.block, {target.place: (basis.to(weight.dtype), coefficients.to(weight.dtype))})


def missing_cross(here: AtBlock, target: Target, aims: Sequence[Tensor], batches: Sequence[int]) -> Tensor:
    """`T Z^T` `[out, in]`, float64: inputs Z of the layer, T what it would have to give to reach the aims.

    All that the block adds besides the layer's output is held fixed, which is exact for the last
    matrix that writes to the residual stream.
    """
    total = torch.zeros(target.out_features, target.in_features, dtype=torch.float64, device=aims[0].device)
    bias = operator(here.block, target.place).bias
    with Recorder(here.block, [target]) as recorder:
        for batch in batches:
            output = here.run(batch)
            for z, members in recorder.by_input():
                own = members[0][1] if bias is None else members[0][1] - bias
                ideal = (aims[batch] - output).reshape(-1, own.shape[-1]) + own.reshape(-1, own.shape[-1])
                total += ideal.T @ z.reshape(-1, z.shape[-1])
    return total


def _notes(index: int, before: float, lowest: float, kept: int, tried: int) -> dict[str, Any]:
    if kept == 0 and tried:
        log.warning("block %d: no regression gained on held-out windows; its factors stay as they were", index)
    figures = {"as_found": float(f"{before:.6g}"), "reached": float(f"{lowest:.6g}")}
    return {"refiner": "alternating", "block": index, **figures, "kept": kept, "tried": tried, "rolled_back": kept == 0}
