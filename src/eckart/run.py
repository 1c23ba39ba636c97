"""One run of the pipeline: the stages, and what they hand to each other."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eckart import checkpoint, data, dtypes, ledger, recipes
from eckart.compression import Calibration, Compression
from eckart.decomposing import decompose, drift_of
from eckart.density import summary
from eckart.discovery import check_finite, discover
from eckart.errors import OptionError
from eckart.factorizers.base import GroupDecomposition
from eckart.factorizing import factorize_group_
from eckart.goals import Goal
from eckart.held_out import WINDOWS as SPARE
from eckart.held_out import HeldOut
from eckart.ledger import Ledger
from eckart.linear import weight_view
from eckart.planning import Planner
from eckart.plans import Plan, resolve
from eckart.progress import Progress, track
from eckart.provenance import make_provenance
from eckart.recipes import Recipe
from eckart.refiners.base import Refinement
from eckart.storage import store_
from eckart.types import Entry, Group, Spectrum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tensor = torch.Tensor
log = logging.getLogger(__name__)


class Run:
    """One run of the pipeline: what its stages hand to each other."""

    def __init__(
        self,
        model: "str | PreTrainedModel",
        recipe: str | Recipe,
        options: Mapping[str, Any] | None,
        calibration: Calibration | None,
        tokenizer: "PreTrainedTokenizerBase | None",
        include: Sequence[str],
        exclude: Sequence[str],
        device: str,
        dtype: str,
        work: str | Path | None,
        progress: Progress,
    ) -> None:
        self.work = None if work is None else Path(work)
        self.seconds: dict[str, float] = {}
        self.progress = progress
        self.recipe = recipe if isinstance(recipe, Recipe) else recipes.find(recipe, options)
        self.factorizer = self.recipe.make_factorizer()
        self.calibration = calibration or Calibration()
        self.source = model if isinstance(model, str) else None
        with self.timed("load"):
            if isinstance(model, str):
                self.model = checkpoint.load_model(model, device=device)
                self.tokenizer = tokenizer or checkpoint.load_tokenizer(model)
            else:
                self.model = model
                if tokenizer is None:
                    raise OptionError("a model in memory comes without its tokenizer; pass tokenizer=...")
                self.tokenizer = tokenizer
            self.stored_dtype = dtypes.named(dtype) or self.model.dtype
            dtypes.cast_(self.model, dtypes.compute_dtype(self.stored_dtype, self.model.device))
            self.model.eval()
        self.layout = discover(self.model, include, exclude)
        log.info("%s: %d targets in %s", type(self.model).__name__, len(self.layout.targets), self.layout.blocks)
        check_finite(self.model, self.layout.targets)
        self.windows: data.Windows | None = None
        self.held_out: HeldOut | None = None
        self.measured_kl: float | None = None
        self.decompositions: dict[str, GroupDecomposition] = {}
        self.drift: dict[str, Any] = {}
        self.summaries: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        if stage in ("load", "save"):  # the others count steps of their own
            self.progress(stage, 0, 1)
        yield
        if stage in ("load", "save"):
            self.progress(stage, 1, 1)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        log.info("%s: %.1f s", stage, self.seconds[stage])

    def make_plan(self, goal: Goal, rank_multiple: int) -> Plan:
        """Decompose everything, then plan what meets the goal."""
        groups = self.recipe.make_grouping().groups(self.layout.targets)
        if goal.keep is not None:
            ledger.check_reachable(groups, goal.keep, rank_multiple)
        self.decompose(groups)
        return Planner(self, groups, goal, rank_multiple).plan()

    def predicts(self) -> bool:
        """Whether the metric predicts the loss; if so, remember what the dense model says on a few windows."""
        known = all(made.spectrum.nats is not None for made in self.decompositions.values())
        if known and self.held_out is None and self.windows is not None:
            self.held_out = HeldOut.of(self.model, self.layout, self.windows)
        return known and self.held_out is not None

    def put(self, model: nn.Module, group: Group, entry: Entry) -> None:
        """Put the factors of one group at the entry's rank into a model, in place."""
        factorize_group_(model, group, entry, self.decompositions[group.name])

    def spectra(self, groups: Sequence[Group]) -> list[Spectrum]:
        """Decompose the groups; their spectra in the same order."""
        self.decompose(groups)
        return [self.decompositions[group.name].spectrum for group in groups]

    def take_plan(self, plan: Plan | str | Path) -> Plan:
        """Check a saved plan against the model and decompose what it factorises."""
        given = plan if isinstance(plan, Plan) else Plan.load(plan)
        groups, entries = resolve(given, self.layout.targets)
        self.decompose([g for g, e in zip(groups, entries, strict=True) if e.rank is not None])
        self.predicts()
        settled = Plan(tuple(self.settle(entries)), given.asked, {}, given.made_by)
        return replace(settled, reached=self.ledger(settled).to_dict())

    def settle(self, entries: Sequence[Entry]) -> list[Entry]:
        """Let the decompositions decide what the allocator left to them (preserved columns)."""
        return [e if e.rank is None else self.decompositions[e.name].settle(e) for e in entries]

    def ledger(self, plan: Plan) -> Ledger:
        groups, entries = resolve(plan, self.layout.targets)
        return ledger.make_ledger(groups, entries, self.layout.parameters, self.stored_dtype.itemsize)

    def decompose(self, groups: Sequence[Group]) -> None:
        """Decompose the groups, unless they are: one calibration serves every plan."""
        if groups and all(self._known(group) for group in groups):
            return
        ids = self.token_windows() if self.factorizer.needs and groups else None
        with self.timed("calibrate and decompose"):
            self.decompositions = decompose(
                self.model, self.layout, groups, self.factorizer, ids, progress=self.progress
            )
            self.drift = drift_of(self.decompositions)
            self.summaries = [summary(made.spectrum) for made in self.decompositions.values()]

    def _known(self, group: Group) -> bool:
        return group.name in self.decompositions and self.decompositions[group.name].group == group

    def token_windows(self) -> Tensor:
        """The calibration windows, read once; `[windows, length]` token ids on the model's device."""
        if self.windows is None:
            with self.timed("data"):
                spec = asdict(self.calibration)
                self.windows = data.load_windows(
                    spec.pop("data"), self.tokenizer, model=self.model, spare=SPARE, **spec
                )
                data.check_length(self.windows, self.model)
                log.info("calibration: %s", self.windows.recipe)
        return self.windows.ids.to(self.model.device)

    def carry_out(self, plan: Plan) -> None:
        """Cut every decomposition at its rank, put the factors in the model, in place, and refine them."""
        from eckart import hf  # imports transformers

        groups, entries = resolve(plan, self.layout.targets)
        keep = self.ledger(plan).keep
        refiners = [refiner for refiner in self.recipe.make_refiners() if refiner.applies(keep)]
        # Refiners see the dense weights: one more copy of the targets in memory, but only if one runs.
        factorised = [name for e in entries if e.rank is not None for name in e.targets] if refiners else []
        dense = {name: weight_view(self.model.get_submodule(name)) for name in factorised}
        ids = self.token_windows() if refiners else None  # now: the dense model may be the author of the text
        with self.timed("factorise"):
            work = list(zip(groups, entries, strict=True))
            for group, entry in track(work, "factorise", len(work), self.progress):
                log.debug("%s: rank %s of %d, %s", group.name, entry.rank, group.full_rank, entry.storage)
                if entry.rank is not None:
                    factorize_group_(self.model, group, entry, self.decompositions.pop(group.name))
        for refiner in refiners:
            assert ids is not None
            with self.timed("refine"):
                refiner.refine_(self.refinement(plan, dense, ids, self.notes))
        with self.timed("store"):
            pivoted = [e.name for e in entries if e.rank is not None and e.storage == "pivoted"]
            for name in track(pivoted, "store", len(pivoted), self.progress):
                store_(self.model, name, "pivoted")
        self._measure(plan, refined=bool(refiners))
        dtypes.cast_(self.model, self.stored_dtype)
        hf.attach_(self.model, hf.specs_of(self.model))

    def refinement(
        self, plan: Plan, dense: Mapping[str, Tensor], ids: Tensor, notes: list[dict[str, Any]]
    ) -> Refinement:
        """What a refiner works on, for this model as it is now."""
        unseen = self.windows.spare.to(ids.device) if self.windows else None
        known = (self.model, self.layout, plan, dense, ids, self.progress, self.work, notes, unseen)
        return Refinement(*known, tokenizer=self.tokenizer)

    def _measure(self, plan: Plan, refined: bool) -> None:
        """The KL divergence of the finished model, if it was predicted and not already measured with the plan."""
        if self.held_out is None:
            return
        self.measured_kl = None if refined else plan.reached.get("measured_kl")
        if self.measured_kl is None:
            with self.timed("probe"):
                self.measured_kl = self.held_out.kl()

    def result(self, plan: Plan, command: str) -> Compression:
        provenance = make_provenance(
            source=self.source,
            model=self.model,
            recipe=self.recipe.to_dict(),
            calibration=None if self.windows is None else self.windows.recipe.to_dict(),
            ledger=self.ledger(plan).to_dict(),
            command=command,
        )
        provenance |= {"refinement": self.notes} if self.notes else {}
        provenance |= {"metric_drift": self.drift} if self.drift else {}
        if self.held_out is not None:
            provenance["kl"] = {"measured": self.measured_kl, "predicted": plan.reached.get("predicted_kl")}
            provenance["kl"] |= self.held_out.to_dict()
        made = (self.model, self.tokenizer, self.layout, plan, self.ledger(plan), provenance, self.seconds)
        return Compression(*made, self.summaries)
