"""Block-collaborative: all linears of a block are compressed together, against the block's output."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError, OptionError
from eckart.linalg import DAMPING, Decomposition, Metric
from eckart.maths.subspace import SOFTENING
from eckart.model.operators import dense_again
from eckart.refiners._block_descent import BlockError, Descent, Schedule, descend
from eckart.refiners._block_factors import factors_of, has_unseen, put_, refinable, split_windows
from eckart.refiners._block_forms import BlockForm, FreeFactors, Start, Subspaces, Whitenings, precise, tied
from eckart.refiners._block_work import BlockWork
from eckart.refiners._residual_metric import residual_metrics
from eckart.refiners._two_streams import AtBlock, two_streams
from eckart.refiners.base import Refinement, Refiner
from eckart.statistics.sums import Gram
from eckart.storages import FactorizedLayer
from eckart.types import Target

log = logging.getLogger(__name__)

GAIN = 1e-5  # relative; less than this on held-out windows is no gain


@final
@dataclass(frozen=True)
class BlockCollaborative(Refiner):
    """Learns the whitening of each matrix from one shared loss, the block's output error (LC-SVD, ICLR 2026 no. 6575).

    Blocks are done in order on two streams of hidden states. `target` is what a block shall give:
    "anchored" the dense block on dense inputs, "same_input" the dense block on the compressed inputs.
    `form`: "svd" learns the whitening with a decomposition at each step, as published; "grassmann" the
    same subspaces without one; "free" goes on from there with both factors untied, for `free_steps` at
    `free_rate`. With `refresh`, each matrix starts from the Gram of what it reads after the earlier
    matrices of its block were replaced; without, from the inputs of the dense block.

    `start` "found" begins at the factors that are in place, whatever made them, instead of whitened
    ones; only the form "free" can. What is held out is text that no statistic has seen (`Refinement.unseen`); where
    there is none, the share `held_out` of the windows. The factors that were found have seen those, so a whitened
    start is then compared with whitened factors of the other windows alone. `metric` "gradient" weighs the output
    error by the Fisher information of the dense model's residual stream there
    (`eckart.refiners._residual_metric`), with the shrinkage a = `gradient_shrinkage` of that matrix towards its mean
    diagonal; 1 is the plain norm.

    `steps` (at most), `rate` and `batch` (windows in a step) are the descent's. Every `check_every` steps
    the error on what is held out is taken; less than `stop` relative gain over five
    checks ends the block. A block that gained nothing there goes back to its layer-wise factors and
    says so. Left as they are: dense targets, shared bases, storages other than a plain pair.
    """

    form: Literal["svd", "grassmann", "free"] = "grassmann"
    target: Literal["anchored", "same_input"] = "anchored"
    start: Literal["whitened", "found"] = "whitened"
    metric: Literal["plain", "gradient"] = "plain"
    gradient_shrinkage: float = 0.1
    steps: int = 100
    rate: float = 1e-3
    batch: int = 8
    held_out: float = 0.1
    check_every: int = 5
    stop: float = 0.005
    refresh: bool = True
    free_steps: int = 100
    free_rate: float = 1e-4
    damping: float = DAMPING
    softening: float = SOFTENING
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rate", "batch", "check_every", "free_steps", "free_rate", "damping"):
            if not getattr(self, name) > 0:
                raise OptionError(f"block_collaborative.{name} is {getattr(self, name):g}, but must be positive.")
        if not 0 < self.held_out < 1:
            raise OptionError(f"block_collaborative.held_out is {self.held_out:g}, but must lie in (0, 1).")
        for name in ("stop", "softening"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"block_collaborative.{name} is {getattr(self, name):g}, but must lie in [0, 1).")
        if not 0 <= self.gradient_shrinkage <= 1:
            value = self.gradient_shrinkage
            raise OptionError(f"block_collaborative.gradient_shrinkage is {value:g}, but must lie in [0, 1].")
        if self.start == "found" and self.form != "free":
            raise OptionError(
                f"block_collaborative.start is found, but the form {self.form} ties factors to the dense weight, and "
                "those that are in place are not; use block_collaborative.form=free."
            )

    @property
    def needs_predictions(self) -> bool:
        return self.metric == "gradient"

    def refine_(self, refinement: Refinement) -> None:
        batches, train, held_out = split_windows(refinement.windows, self.batch, self.held_out, refinement.unseen)
        finished = BlockWork(refinement, "block_collaborative", asdict(self))
        metrics: list[Tensor] | None = None
        if self.metric == "gradient":  # of the training windows: what is held out trains nothing
            trained = torch.cat([batches[number] for number in train])
            metrics = residual_metrics(refinement, trained, self.gradient_shrinkage, self.seed)
        changeable = refinable(refinement)
        for here in two_streams(refinement, batches):
            metric = None if metrics is None else metrics[here.index]
            job = _Job(self, refinement, here, changeable, train, held_out, metric)
            notes = finished.restore_(here.index, here.block)
            if notes is None:
                notes = job.collaborate()
                finished.write(here.index, factors_of(here.block, job.chosen), notes)
            else:
                job.aims()  # the dense stream still has to pass the block
            refinement.notes.append(notes)


@dataclass
class _Job:
    """One block: start, descend, keep the best or roll back, put the factors in."""

    options: BlockCollaborative
    refinement: Refinement
    here: AtBlock
    changeable: frozenset[str]
    train: Sequence[int]
    held_out: Sequence[int]
    metric: Tensor | None = None
    chosen: list[Target] = field(init=False)

    def __post_init__(self) -> None:
        self.chosen = [target for target in self.here.targets if target.name in self.changeable]

    @property
    def index(self) -> int:
        return self.here.index

    @property
    def block(self) -> nn.Module:
        return self.here.block

    def aims(self) -> list[Tensor]:
        return self.here.aims(self.refinement.dense_weights, self.options.target)

    def collaborate(self) -> dict[str, Any]:
        """The block ends with the best factors seen, and returns its notes."""
        error = BlockError(self.here, self.aims(), self.metric)
        notes: dict[str, Any] = {"refiner": "block_collaborative", "block": self.index}
        if self.chosen:
            notes |= self._descend(error)
        others = [target for target in self.here.targets if target.name not in self.changeable]
        if left := [target.place for target in others if target.name in self.refinement.dense_weights]:
            notes["left_alone"] = left
        return notes

    def _descend(self, error: BlockError) -> dict[str, Any]:
        safe = descent = Descent(error.over({}, self.held_out), factors_of(self.block, self.chosen), 0)
        if not safe.best < torch.inf:
            raise NumericalError(f"block {self.index}: its output holds NaN or infinity before any step.")
        notes: dict[str, Any] = {"as_found": safe.best}
        if self.options.start == "whitened":
            form = self._start()
            layer_wise = error.over({}, self.held_out)
            if layer_wise < safe.best or not has_unseen(self.refinement):
                safe = Descent(layer_wise, factors_of(self.block, self.chosen), 0)
            descent = self._run(form, error, Schedule(*self._schedule("steps", "rate")))
            notes |= {"layer_wise": layer_wise, "reached": descent.best, "steps": descent.steps}
        if self.options.form == "free":
            notes |= {"tied": descent.best} if self.options.start == "whitened" else {}
            free = self._run(FreeFactors(descent.factors), error, Schedule(*self._schedule("free_steps", "free_rate")))
            descent = free if free.best < descent.best else descent
            notes |= {"reached": descent.best, "free_steps": free.steps}
        rolled_back = not descent.best < (1 - GAIN) * safe.best
        if rolled_back:
            descent = safe
            log.warning("block %d: no gain on held-out windows; back to its layer-wise factors", self.index)
        put_(self.block, descent.factors)
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in notes.items()}
        return {**rounded, "rolled_back": rolled_back}

    def _schedule(self, steps: str, rate: str) -> tuple[int, float, int, float]:
        options = self.options
        return getattr(options, steps), getattr(options, rate), options.check_every, options.stop

    def _run(self, form: BlockForm, error: BlockError, schedule: Schedule) -> Descent:
        generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + self.index)
        total = 1 + max(target.block for target in self.refinement.layout.targets)

        def stepped(done: int) -> None:
            self.refinement.progress("collaborate", self.index * schedule.steps + done, total * schedule.steps)

        return descend(form, error, self.train, self.held_out, schedule, generator, stepped)

    @torch.no_grad()
    def _start(self) -> BlockForm:
        """Put whitened factors in, stage by stage in forward order, and make the form that starts there."""
        options = self.options
        order = [[t for t in stage if t in self.chosen] for stage in self.here.stages()]
        order = [stage for stage in order if stage]
        grams: dict[str, Gram] = {}
        if not options.refresh:
            with dense_again(self.block, self.refinement.dense_weights, self.here.targets):
                for stage in order:
                    grams |= self.here.input_grams(stage, self.train)
        for stage in order:
            if options.refresh:
                grams |= self.here.input_grams(stage, self.train)
            for target in stage:
                put_(self.block, {target.place: self._whitened(target, grams[target.place])})
        ran = [target for stage in order for target in stage]
        weights = {target.place: self.refinement.dense_weights[target.name] for target in ran}
        start = factors_of(self.block, ran)
        if options.form != "svd":
            return Subspaces(weights, {kind: coefficients for kind, (_, coefficients) in start.items()})
        begins = {kind: Start(grams[kind].matrix, len(basis)) for kind, (basis, _) in start.items()}
        return Whitenings(weights, begins, options.damping, options.softening)

    def _whitened(self, target: Target, gram: Gram) -> tuple[Tensor, Tensor]:
        """The tied factors of SVD-LLM on this Gram: coefficients Q, basis `Q^T W`."""
        weight = self.refinement.dense_weights[target.name]
        layer = self.block.get_submodule(target.place)
        assert isinstance(layer, FactorizedLayer)
        _, point = Decomposition(weight, Metric(right=gram.side(self.options.damping))).truncate(layer.rank)
        return tied(precise(point), weight)
