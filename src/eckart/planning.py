"""From decompositions to a plan that meets a goal: what the allocator sees, what it decides, what that measures."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from eckart import ledger, recipes
from eckart.allocators.base import Allocator, Probe
from eckart.correction import Correction, corrected
from eckart.demo_assets import cache_folder
from eckart.density import summary, with_figures
from eckart.goals import Goal, header_bytes, meet, predicted_kl
from eckart.observation import needs_windows, observe
from eckart.part_probe import Part, measure_parts
from eckart.plans import Plan
from eckart.probe import SlicingProbe, in_place, split_for_search
from eckart.provenance import versions
from eckart.types import Budget, Entry, Group, Spectrum
from eckart.work import WorkFolder, fingerprint, state_of

if TYPE_CHECKING:
    from eckart.run import Run


class Planner:
    """Plans for one goal of a run, whose groups are decomposed. No weight is touched for good."""

    def __init__(self, run: "Run", groups: Sequence[Group], goal: Goal, rank_multiple: int) -> None:
        self.run, self.groups, self.goal, self.rank_multiple = run, groups, goal, rank_multiple
        self.allocator = run.recipe.make_allocator()
        self.overhead = header_bytes(run.model.state_dict(), run.layout.targets)

    def plan(self) -> Plan:
        """The plan that meets the goal; with a recipe that predicts its loss, corrected by what is measured."""
        made, level = self._meet(None), self.allocator.correction_level()
        if not self.run.predicts() or level == "off":
            return made
        spectra = self.run.spectra(self.groups)
        return corrected(self.goal, made, self._meet, spectra, level, partial(self._measure, made), self._kl)

    def _meet(self, correction: Correction | None) -> Plan:
        """The plan that meets the goal by predictions."""
        with self.run.timed("allocate"):
            parameters = self.run.layout.target_parameters
            return meet(self.goal, lambda keep: self._allocate(keep, correction), parameters, self.overhead)

    def _allocate(self, keep: float, correction: Correction | None) -> Plan:
        """The allocator's plan for a share, with what it reaches by the ledger and by the metric."""
        run, allocator, budget = self.run, self.allocator, Budget(keep, self.rank_multiple)
        spectra = run.spectra(self.groups)
        if correction is not None:
            spectra = correction.apply(spectra)
        if needs_windows(allocator):
            spectra = self._observe(allocator, keep)
            run.summaries = [summary(spectrum) for spectrum in spectra]
        windows = allocator.probe_windows()
        search = windows and partial(allocator.search, probe=self._probe(windows))
        entries = (search or allocator.allocate)(spectra, budget)
        entries = run.settle([with_figures(e, s) for e, s in zip(entries, spectra, strict=True)])
        asked = {**self.goal.to_dict(), "rank_multiple": self.rank_multiple}
        made = Plan(tuple(entries), asked, {}, run.recipe.to_dict())
        reached = run.ledger(made)
        if not allocator.may_exceed:
            ledger.assert_within(reached, keep)
        predicted = predicted_kl(spectra, entries)
        return replace(
            made, reached={**reached.to_dict(), **({} if predicted is None else {"predicted_kl": predicted})}
        )

    def _observe(self, allocator: Allocator, keep: float) -> list[Spectrum]:
        """Run what the allocator wants to see beside the spectra; the journals are in the work folder."""
        run = self.run
        ids = run.token_windows()
        assert run.windows is not None
        data_recipe = run.windows.recipe.to_dict()
        plain = run.factorizer.resting()
        depends = {
            "factorizer": recipes.describe(type(plain).__name__, plain),
            "calibration": {key: data_recipe[key] for key in ("tokens_hash", "windows", "length")},
        }
        with run.timed("observe"):
            return observe(
                run.model,
                run.layout,
                {group.name: run.decompositions[group.name] for group in self.groups},
                allocator,
                ids,
                keep,
                work=run.work or cache_folder() / "work",
                depends=depends,
                progress=run.progress,
            )

    def _probe(self, windows: tuple[int, int]) -> Probe:
        """What measures candidate plans by slicing the decompositions; `windows` to score on, and held out."""
        run = self.run
        scoring, held_out = split_for_search(run.token_windows(), *windows)
        facts = {"factorizer": run.recipe.to_dict()["factorizer"], "versions": versions()}
        tensors = [*state_of(run.model), ("scoring", scoring), ("held out", held_out)] if run.work else []
        folder = WorkFolder(run.work, "probe", fingerprint(facts, tensors))
        return SlicingProbe(run.model, self.groups, run.put, scoring, held_out, folder, run.progress)

    def _measure(self, made: Plan, parts: Sequence[Part]) -> list[float]:
        """What parts of a plan cost in KL, each measured alone."""
        run = self.run
        assert run.held_out is not None
        with run.timed("probe"):
            return measure_parts(
                run.model, self.groups, made.entries, run.put, run.held_out, parts, progress=run.progress
            )

    def _kl(self, entries: Sequence[Entry]) -> float:
        """The KL divergence of a candidate plan from the dense model, measured."""
        assert self.run.held_out is not None
        with self.run.timed("probe"), in_place(self.run.model, self.groups, entries, self.run.put):
            return self.run.held_out.kl()
