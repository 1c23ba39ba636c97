"""From decompositions to a plan that meets a goal: decompose and observe once, meet the goal, then correct.

No weight is touched for good.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from eckart import ledger, recipes
from eckart.allocators.base import Allocator, Probe
from eckart.allocators.uniform import Uniform
from eckart.errors import PlanError
from eckart.measuring.held_out import HeldOut
from eckart.measuring.probes import SlicingProbe, in_place, measure_parts, split_for_search
from eckart.measuring.scene import Scene, observe
from eckart.planning.correction import Correction, corrected
from eckart.planning.decomposed import Decomposed, decompose
from eckart.planning.evenness import evenness
from eckart.planning.goals import Goal, header_bytes, meet, meet_in_bytes, predicted_kl
from eckart.planning.loaded import Loaded, Text
from eckart.plans import Plan, resolve
from eckart.plans.figures import summary, with_figures
from eckart.progress import Stages
from eckart.recipes import Recipe
from eckart.support.cache import cache_folder
from eckart.support.versions import versions
from eckart.support.work import Key, WorkFolder
from eckart.types import Budget, Entry, Group, Packing, Part, Spectrum

log = logging.getLogger("eckart.run")


@dataclass
class Planned:
    """A plan and what it was made from. `held_out` measures the KL; it is None where the metric predicts none."""

    plan: Plan
    decomposed: Decomposed
    held_out: HeldOut | None = None
    summaries: list[dict[str, Any]] = field(default_factory=list)
    evenness: dict[str, float | None] = field(default_factory=dict)


def make_plan(
    loaded: Loaded,
    text: Text,
    recipe: Recipe,
    goal: Goal,
    *,
    rank_multiple: int = 1,
    work: Path | None = None,
    spill: Path | None = None,
    stages: Stages,
) -> Planned:
    """The plan of a recipe that meets a goal; where the recipe predicts its loss, corrected by what is measured."""
    groups = recipe.groups(loaded.layout.targets)
    if goal.keep is not None and not recipe.widths:
        ledger.check_reachable(groups, goal.keep, rank_multiple, recipe.storage)
    decomposed = decompose_for(loaded, text, recipe, groups, spill=spill, packing=recipe.packing, stages=stages)
    return plan_from(decomposed, loaded, text, recipe, goal, rank_multiple=rank_multiple, work=work, stages=stages)


def plan_from(
    decomposed: Decomposed,
    loaded: Loaded,
    text: Text,
    recipe: Recipe,
    goal: Goal,
    *,
    rank_multiple: int = 1,
    work: Path | None = None,
    stages: Stages,
) -> Planned:
    """The same from the recipe's groups decomposed already: one calibration serves any number of goals."""
    held_out = hold_out(loaded, text, decomposed)
    task = _Task(loaded, recipe, goal, rank_multiple, decomposed, stages)
    allocator = recipe.make_allocator()
    spectra = _observed(task, text, allocator, work)
    allocate = _allocation(task, text, allocator, work)

    def answer(correction: Correction | None) -> Plan:
        return task.meet(allocate, spectra if correction is None else correction.apply(spectra))

    plan, level = answer(None), allocator.correction_level()
    keep = goal.keep or min(1.0, float(plan.reached["keep"]) * (1 + 1e-9))
    even = evenness(decomposed, plan.entries, allocator, Budget(keep, rank_multiple, recipe.storage))
    if even:
        log.info(
            "one rank for the experts of a layer: predicted KL %.4g nats per token; with experts.ranks=free %.4g",
            *even.values(),
        )
    if held_out is not None and level != "off":
        measure, kl = partial(_measure, task, held_out, plan), partial(_kl, task, held_out)
        plan = corrected(goal, plan, answer, spectra, level, measure, kl)
    return Planned(plan, decomposed, held_out, [summary(spectrum) for spectrum in spectra], even)


def take_plan(
    loaded: Loaded, text: Text, recipe: Recipe, plan: Plan, *, spill: Path | None = None, stages: Stages
) -> Planned:
    """Check a saved plan against the model and decompose what it factorises.

    Raises `PlanError` when it does not fit, or gives a rank to a target that no token of the text reached.
    """
    groups, entries = resolve(plan, loaded.layout.targets)
    cut = [group for group, entry in zip(groups, entries, strict=True) if not entry.is_dense]
    packing = Packing() if any(entry.bits is not None for entry in entries) else None
    decomposed = decompose_for(loaded, text, recipe, cut, spill=spill, packing=packing, stages=stages)
    for name, reason in decomposed.left.items():
        raise PlanError(
            f"{name}: has a rank in the plan, but {reason}; make it dense there, or calibrate on text that reaches it."
        )
    settled = Plan(tuple(decomposed.settle(entries)), plan.asked, {}, plan.made_by)
    plan = replace(settled, reached=loaded.ledger(settled).to_dict())
    summaries = [summary(spectrum) for spectrum in decomposed.spectra]
    return Planned(plan, decomposed, hold_out(loaded, text, decomposed), summaries)


def decompose_for(
    loaded: Loaded,
    text: Text,
    recipe: Recipe,
    groups: Sequence[Group],
    *,
    spill: Path | None = None,
    packing: Packing | None = None,
    stages: Stages,
) -> Decomposed:
    """Decompose the groups by the recipe's factorizer, which reads the text only if it needs statistics.

    Targets of which nothing is known after the text leave the layout, with the reason.
    """
    factorizer = recipe.make_factorizer()
    ids = text.ids() if factorizer.needs and groups else None
    with stages("calibrate and decompose"):
        decomposed = decompose(
            loaded.model, loaded.layout, groups, factorizer, ids,
            spill=spill, prior=recipe.make_experts().prior, packing=packing, progress=stages.progress,
        )  # fmt: skip
    if decomposed.routed:
        log.log(*decomposed.routed.message(loaded.layout))
    for reason in dict.fromkeys(decomposed.left.values()):
        names = [name for name, why in decomposed.left.items() if why == reason]
        log.warning("stays dense, since %s: %s", reason, ", ".join(names))
        loaded.layout = loaded.layout.without(names, reason)
    return decomposed


def hold_out(loaded: Loaded, text: Text, decomposed: Decomposed) -> HeldOut | None:
    """The dense model's predictions on a few windows; None if no text was read or the metric predicts no loss."""
    if not decomposed.predicts or text.windows is None:
        return None
    return HeldOut.of(loaded.model, loaded.layout, text.windows)


@dataclass(frozen=True)
class _Task:
    """What is to be planned: a goal for the decomposed groups of a model, by a recipe."""

    loaded: Loaded
    recipe: Recipe
    goal: Goal
    rank_multiple: int
    decomposed: Decomposed
    stages: Stages

    def meet(self, allocate: "Allocate", spectra: Sequence[Spectrum]) -> Plan:
        """The plan that meets the goal, of those that an allocator makes for a share of the parameters."""
        packs = self.recipe.packing is not None
        overhead = header_bytes(self.loaded.model.state_dict(), self.loaded.layout.targets, 9 if packs else 3)
        with self.stages("allocate"):
            if packs:
                return self._meet_in_bytes(allocate, spectra, overhead)
            return meet(self.goal, lambda keep: self._plan(allocate, spectra, keep), overhead)

    def _meet_in_bytes(self, allocate: "Allocate", spectra: Sequence[Spectrum], overhead: int) -> Plan:
        """The same with few bits: bytes are shared out, of the groups that can have few."""
        each = self.loaded.stored_dtype.itemsize
        dense = self._reached([Entry(s.group.names, None) for s in spectra], spectra)
        rest = dense.reached["model_bytes_kept"] - each * sum(s.group.parameters for s in spectra)

        def plan_for(most: int) -> Plan:
            budget = Budget(1.0, self.rank_multiple, self.recipe.storage, bytes=most, itemsize=each)
            plan = self._reached(allocate(spectra, budget), spectra)
            ledger.assert_within_bytes(plan.reached["model_bytes_kept"] - rest, most)
            return plan

        return meet_in_bytes(self.goal, plan_for, dense, rest, overhead)

    def _plan(self, allocate: "Allocate", spectra: Sequence[Spectrum], keep: float) -> Plan:
        """The plan for a share, with what it reaches by the ledger and by the metric."""
        plan = self._reached(allocate(spectra, Budget(keep, self.rank_multiple, self.recipe.storage)), spectra)
        if not allocate.may_exceed:
            ledger.assert_within(self.loaded.ledger(plan), keep)
        return plan

    def _reached(self, entries: Sequence[Entry], spectra: Sequence[Spectrum]) -> Plan:
        entries = [replace(e, own_bases=s.group.own_bases) for e, s in zip(entries, spectra, strict=True)]
        entries = self.decomposed.settle([with_figures(e, s) for e, s in zip(entries, spectra, strict=True)])
        goal = {**self.goal.to_dict(), "rank_multiple": self.rank_multiple}
        plan = Plan(tuple(entries), goal, {}, self.recipe.to_dict())
        reached, predicted = self.loaded.ledger(plan), predicted_kl(spectra, entries)
        loss = {} if predicted is None else {"predicted_kl": predicted}
        return replace(plan, reached={**reached.to_dict(), **loss})


@dataclass(frozen=True)
class Allocate:
    """An allocator with all that it may use: spectra and a budget in, entries out."""

    choose: Callable[[Sequence[Spectrum], Budget], list[Entry]]
    may_exceed: bool = False

    def __call__(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        return self.choose(spectra, budget)


def _allocation(task: _Task, text: Text, allocator: Allocator, work: Path | None) -> Allocate:
    windows = allocator.probe_windows()
    choose = allocator.allocate
    if windows:
        choose = partial(allocator.search, probe=_probe(task, text, windows, work))
    return Allocate(choose, allocator.may_exceed)


def _observed(task: _Task, text: Text, allocator: Allocator, work: Path | None) -> list[Spectrum]:
    """The spectra with all that the allocator `wants`, measured near the share that the goal leads to."""
    spectra = task.decomposed.spectra
    if not allocator.wants:
        return spectra
    keep = task.goal.keep
    if keep is None:  # uniform ranks meet the goal at nearly the same share
        keep = float(task.meet(Allocate(Uniform().allocate), spectra).reached["keep"])
    plain = task.recipe.make_factorizer().plain()
    text_recipe = text.read().recipe.to_dict()
    depends = {
        "factorizer": recipes.describe(type(plain).__name__, plain),
        "calibration": {key: text_recipe[key] for key in ("tokens_hash", "windows", "length")},
    }
    loaded, decomposed = task.loaded, task.decomposed
    folder = work or cache_folder() / "work"
    with task.stages("observe"):
        scene = Scene(
            loaded.model, loaded.layout, decomposed.groups, decomposed.cut, text.ids(), keep, task.recipe.storage,
            folder, depends, task.stages.progress,
        )  # fmt: skip
        return observe(scene, spectra, allocator)


def _probe(task: _Task, text: Text, windows: tuple[int, int], work: Path | None) -> Probe:
    """What measures candidate plans by slicing the decompositions; `windows` to score on, and held out."""
    scoring, held_out = split_for_search(text.ids(), *windows)
    factorizer = task.recipe.to_dict()["factorizer"]
    key = Key(
        "probe", factorizer=factorizer, weights=task.loaded.model, scoring=scoring, held_out=held_out,
        groups=[group.names for group in task.decomposed.groups], versions=versions(),
    )  # fmt: skip
    loaded, decomposed = task.loaded, task.decomposed
    return SlicingProbe(
        loaded.model, decomposed.groups, decomposed.cut, scoring, held_out, WorkFolder(work, key), task.stages.progress
    )


def _measure(task: _Task, held_out: HeldOut, plan: Plan, parts: Sequence[Part]) -> list[float]:
    """What parts of a plan cost in KL, each measured alone."""
    loaded, decomposed = task.loaded, task.decomposed
    with task.stages("probe"):
        return measure_parts(
            loaded.model, decomposed.groups, plan.entries, decomposed.cut, held_out, parts,
            progress=task.stages.progress,
        )  # fmt: skip


def _kl(task: _Task, held_out: HeldOut, entries: Sequence[Entry]) -> float:
    """The KL divergence of a candidate plan from the dense model, measured."""
    decomposed = task.decomposed
    with task.stages("probe"), in_place(task.loaded.model, decomposed.groups, entries, decomposed.cut):
        return held_out.kl()
