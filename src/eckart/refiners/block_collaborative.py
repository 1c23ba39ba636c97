"""Block-collaborative: all linears of a block are compressed together, against the block's output."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch
from torch import nn

from eckart.block_descent import BlockError, Descent, Schedule, descend
from eckart.block_factors import factors_of, put_, refinable, split_windows
from eckart.block_forms import BlockForm, FreeFactors, Start, Subspaces, Whitenings, precise, tied
from eckart.errors import NumericalError, OptionError
from eckart.linalg import DAMPING, Decomposition, Metric
from eckart.linear import FactorizedLinear
from eckart.plans import Plan
from eckart.provenance import versions
from eckart.refiners.base import Refinement, Refiner
from eckart.statistics import Gram
from eckart.subspace import SOFTENING
from eckart.two_streams import TwoStreams, dense_again, input_gram, stages
from eckart.types import Target
from eckart.work import WorkFolder, fingerprint, state_of

Tensor = torch.Tensor
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

    `steps` (at most), `rate` and `batch` (windows in a step) are the descent's. Every `check_every` steps
    the error on the share `held_out` of the windows is taken; less than `stop` relative gain over five
    checks ends the block. A block that gained nothing there goes back to its layer-wise factors and
    says so. Left as they are: dense targets, shared bases, storages other than a plain pair.
    """

    form: Literal["svd", "grassmann", "free"] = "grassmann"
    target: Literal["anchored", "same_input"] = "anchored"
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

    def refine_(self, work: Refinement) -> None:
        batches, train, held_out = split_windows(work.windows, self.batch, self.held_out)
        folder = WorkFolder(work.work, "blocks", self._key(work) if work.work else "")
        blocks = work.layout.block_list(work.model)
        streams = TwoStreams.open(work.model, blocks, batches)
        able = refinable(work)
        for index, block in enumerate(blocks):
            targets = [target for target in work.layout.targets if target.block == index]
            job = _Job(self, work, streams, block, targets, able, train, held_out)
            notes = job.restore(folder) or job.collaborate(folder)
            work.notes.append(notes)
            streams.advance(block)

    def _key(self, work: Refinement) -> str:
        plan = Plan(work.plan.entries).to_dict()
        facts = {"refiner": "block_collaborative", **asdict(self), "plan": plan, "versions": versions()}
        tensors = [*state_of(work.model), *sorted(work.dense_weights.items()), ("windows", work.windows)]
        return fingerprint(facts, tensors)


@dataclass
class _Job:
    """One block: start, descend, keep the best or roll back, put the factors in, keep the piece."""

    options: BlockCollaborative
    work: Refinement
    streams: TwoStreams
    block: nn.Module
    targets: Sequence[Target]
    able: frozenset[str]
    train: Sequence[int]
    held_out: Sequence[int]

    @property
    def index(self) -> int:
        return self.streams.position

    def restore(self, folder: WorkFolder) -> dict[str, Any] | None:
        """Take the block from the work folder if it is there; the dense stream still has to pass it."""
        found = folder.find(f"block-{self.index:04d}")
        if found is None:
            return None
        tensors, notes = found
        kinds = {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}
        for kind in kinds:
            put_(self.block, {kind: (tensors[f"{kind}.basis.weight"], tensors[f"{kind}.coefficients.weight"])})
        self._goals()
        return notes

    def collaborate(self, folder: WorkFolder) -> dict[str, Any]:
        goals = self._goals()
        chosen = [target for target in self.targets if target.name in self.able]
        notes: dict[str, Any] = {"refiner": "block_collaborative", "block": self.index}
        if chosen:
            notes |= self._descend(goals, chosen)
        if left := [t.kind for t in self.targets if t.name in self.work.dense_weights and t.name not in self.able]:
            notes["left_alone"] = left
        factors = factors_of(self.block, chosen)
        tensors = {f"{kind}.basis.weight": basis for kind, (basis, _) in factors.items()}
        tensors |= {f"{kind}.coefficients.weight": coefficients for kind, (_, coefficients) in factors.items()}
        folder.keep(f"block-{self.index:04d}", tensors, notes)
        return notes

    def _goals(self) -> list[Tensor]:
        return self.streams.goals(self.block, self.work.dense_weights, self.targets, self.options.target)

    def _descend(self, goals: list[Tensor], chosen: Sequence[Target]) -> dict[str, Any]:
        """Descend from the layer-wise start; the block ends with the best factors seen."""
        error = BlockError(self.streams, self.block, goals)
        found = factors_of(self.block, chosen)
        as_found = error.over({}, self.held_out)
        if not as_found < torch.inf:
            raise NumericalError(f"block {self.index}: its output holds NaN or infinity before any step.")
        form = self._start(chosen)
        start = factors_of(self.block, chosen)
        layer_wise = error.over({}, self.held_out)
        made = self._run(form, error, Schedule(*self._schedule("steps", "rate")))
        notes = {"as_found": as_found, "layer_wise": layer_wise, "reached": made.best, "steps": made.steps}
        if self.options.form == "free":
            notes["tied"] = made.best
            free = self._run(FreeFactors(made.factors), error, Schedule(*self._schedule("free_steps", "free_rate")))
            made = free if free.best < made.best else made
            notes |= {"reached": made.best, "free_steps": free.steps}
        rolled_back = not made.best < (1 - GAIN) * min(as_found, layer_wise)
        if rolled_back:
            made = Descent(min(as_found, layer_wise), found if as_found <= layer_wise else start, made.steps)
            log.warning("block %d: no gain on held-out windows; back to its layer-wise factors", self.index)
        put_(self.block, made.factors)
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in notes.items()}
        return {**rounded, "rolled_back": rolled_back}

    def _schedule(self, steps: str, rate: str) -> tuple[int, float, int, float]:
        options = self.options
        return getattr(options, steps), getattr(options, rate), options.check_every, options.stop

    def _run(self, form: BlockForm, error: BlockError, schedule: Schedule) -> Descent:
        generator = torch.Generator().manual_seed(1_000_003 * self.options.seed + self.index)
        total = len(self.work.layout.block_list(self.work.model))

        def stepped(done: int) -> None:
            self.work.progress("collaborate", self.index * schedule.steps + done, total * schedule.steps)

        return descend(form, error, self.train, self.held_out, schedule, generator, stepped)

    @torch.no_grad()
    def _start(self, chosen: Sequence[Target]) -> BlockForm:
        """Put whitened factors in, stage by stage in forward order, and make the form that starts there."""
        options, wanted = self.options, {target.name for target in chosen}
        order = [[t for t in stage if t.name in wanted] for stage in stages(self.streams, self.block, self.targets)]
        order = [stage for stage in order if stage]
        grams: dict[str, Gram] = {}
        if not options.refresh:
            with dense_again(self.block, self.targets, self.work.dense_weights):
                for stage in order:
                    gram = input_gram(self.streams, self.block, stage[0], self.train)
                    grams |= {target.kind: gram for target in stage}
        for stage in order:
            if options.refresh:
                gram = input_gram(self.streams, self.block, stage[0], self.train)
                grams |= {target.kind: gram for target in stage}
            for target in stage:
                put_(self.block, {target.kind: self._whitened(target, grams[target.kind])})
        ran = [target for stage in order for target in stage]
        weights = {target.kind: self.work.dense_weights[target.name] for target in ran}
        start = factors_of(self.block, ran)
        if options.form != "svd":
            return Subspaces(weights, {kind: coefficients for kind, (_, coefficients) in start.items()})
        begins = {kind: Start(grams[kind].matrix, len(basis)) for kind, (basis, _) in start.items()}
        return Whitenings(weights, begins, options.damping, options.softening)

    def _whitened(self, target: Target, gram: Gram) -> tuple[Tensor, Tensor]:
        """The tied factors of SVD-LLM on this Gram: coefficients Q, basis `Q^T W`."""
        weight = self.work.dense_weights[target.name]
        layer = self.block.get_submodule(target.kind)
        assert isinstance(layer, FactorizedLinear)
        _, point = Decomposition(weight, Metric(right=gram.side(self.options.damping))).truncate(layer.rank)
        return tied(precise(point), weight)
