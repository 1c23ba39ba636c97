"""Carry out a plan: cut, put the factors in the place of weights, refine, store, measure; and what comes out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eckart.checkpoints import checkpoint
from eckart.checkpoints.fused import spare_factors_
from eckart.checkpoints.provenance import make_provenance
from eckart.ledger import Ledger
from eckart.model.discovery import Layout
from eckart.model.experts import close_all_
from eckart.model.factorise import store_
from eckart.model.operators import operator
from eckart.planning.loaded import Loaded, Text
from eckart.planning.planner import Planned
from eckart.plans import Plan, resolve
from eckart.portable.linear import swap_
from eckart.progress import Stages, track
from eckart.recipes import Recipe
from eckart.refiners.base import Refinement, Refiner
from eckart.support import dtypes
from eckart.support.dtypes import round_
from eckart.support.files import OutputFolder
from eckart.support.memory import give_back
from eckart.types import Entry, Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass
class Compression:
    """A compressed model and how it came about.

    `seconds` holds the wall time of each stage; it is not saved with the model.

    `spectra` holds a `plans.figures.summary` of every group that was decomposed.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    layout: Layout
    plan: Plan
    ledger: Ledger
    provenance: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    spectra: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None
    own_tokenizer: bool = True

    def save(self, folder: str | Path | OutputFolder) -> None:
        """Write the checkpoint, with what stood beside the weights of a model that came by name.

        Raises `OutputError` and leaves nothing behind if it cannot.
        """
        checkpoint.save(
            self.model,
            folder,
            tokenizer=self.tokenizer,
            plan=self.plan,
            provenance=self.provenance,
            spectra=self.spectra,
            source=self.source,
            own_tokenizer=self.own_tokenizer,
        )


def carry_out(
    loaded: Loaded,
    text: Text,
    recipe: Recipe,
    planned: Planned,
    *,
    work: Path | None,
    stages: Stages,
    command: Callable[..., str],
) -> Compression:
    """Carry out a plan on a model, in place; decompositions are dropped as they are cut.

    `command(calibration=...)` gives the command line that repeats the run; `calibration` is None if no text was read.
    """
    groups, entries = resolve(planned.plan, loaded.layout.targets)
    book = loaded.ledger(planned.plan)
    refiners = [refiner for refiner in recipe.make_refiners() if refiner.applies(book.keep)]
    dense: dict[str, Tensor] = {}
    if refiners:
        # Refiners see the dense weights: one more copy of the targets in memory, but only if one runs.
        names = [name for entry in entries if not entry.is_dense for name in entry.targets]
        dense = {name: operator(loaded.model, name).weight for name in names}
        text.read()  # now: the dense model may be the author of the text
    drift, routed = planned.decomposed.drift, planned.decomposed.routed
    experts = {**routed.to_dict(), **planned.evenness} if routed else {}
    _factorise(loaded, planned, groups, entries, stages)
    notes = _refine(loaded, text, planned.plan, refiners, dense, work, stages)
    _store(loaded, entries, stages)
    rounded = round_(loaded.model, loaded.stored_dtype)
    kl = _measured(planned, changed=bool(refiners) or rounded, stages=stages)
    _finish(loaded)
    provenance = make_provenance(
        source=loaded.source,
        model=loaded.model,
        recipe=recipe.to_dict(),
        calibration=None if text.windows is None else text.windows.recipe.to_dict(),
        ledger=book.to_dict(),
        command=command(calibration=None if text.windows is None else text.calibration),
    )
    coverage = {"covered": loaded.layout.covered, "uncovered": loaded.layout.uncovered}
    for name, facts in (
        ("coverage", coverage),
        ("refinement", notes),
        ("metric_drift", drift),
        ("kl", kl),
        ("experts", experts),
    ):
        provenance |= {name: facts} if facts else {}
    return Compression(
        loaded.model, loaded.tokenizer, loaded.layout, planned.plan, book, provenance, stages.seconds,
        planned.summaries, loaded.source, loaded.own_tokenizer,
    )  # fmt: skip


def _factorise(
    loaded: Loaded, planned: Planned, groups: Sequence[Group], entries: Sequence[Entry], stages: Stages
) -> None:
    """Cut every decomposition at its rank and put the factors in the model."""
    pairs = list(zip(groups, entries, strict=True))
    with stages("factorise"):
        for group, entry in track(pairs, "factorise", len(pairs), stages.progress):
            log.debug("%s: rank %s of %d, %s", group.name, entry.rank, group.full_rank, entry.storage)
            if not entry.is_dense:
                for name, layer in planned.decomposed.cut(group, entry).items():
                    swap_(loaded.model, name, layer)
                planned.decomposed.drop(group.name)
        give_back()


def _refine(
    loaded: Loaded,
    text: Text,
    plan: Plan,
    refiners: Sequence[Refiner],
    dense: Mapping[str, Tensor],
    work: Path | None,
    stages: Stages,
) -> list[dict[str, Any]]:
    """Run the refiners one after the other; returns their notes."""
    notes: list[dict[str, Any]] = []
    for refiner in refiners:
        ids = text.ids()
        unseen = text.read().unseen.to(ids.device)
        refinement = Refinement(
            loaded.model, loaded.layout, plan, dense, ids, stages.progress, work, notes, unseen, loaded.tokenizer
        )
        with stages("refine"):
            refiner.refine_(refinement)
    return notes


def _store(loaded: Loaded, entries: Sequence[Entry], stages: Stages) -> None:
    """Store every factorised layer as the plan says."""
    factors = [e for e in entries if e.rank is not None and not e.kept and e.bits is None]
    storages = {name: e.storage for e in factors for name in e.targets}
    with stages("store"):
        for name, storage in track(storages.items(), "store", len(storages), stages.progress):
            store_(loaded.model, name, storage)


def _measured(planned: Planned, changed: bool, stages: Stages) -> dict[str, Any]:
    """Predicted and measured KL divergence of the finished model; empty where none is predicted.

    What was measured of the plan is taken, unless refiners or rounding have changed the model since.
    """
    if planned.held_out is None:
        return {}
    measured = None if changed else planned.plan.reached.get("measured_kl")
    if measured is None:
        with stages("probe"):
            measured = planned.held_out.kl()
    predicted = planned.plan.reached.get("predicted_kl")
    return {"measured": measured, "predicted": predicted, **planned.held_out.to_dict()}


def _finish(loaded: Loaded) -> None:
    """Close the stacks of experts, cast to the stored dtype, and attach what plain `save_pretrained` needs."""
    from eckart.portable import hf  # imports transformers

    close_all_(loaded.model)
    dtypes.cast_(loaded.model, loaded.stored_dtype)
    specs = hf.specs_of(loaded.model)
    hf.attach_(loaded.model, specs)
    spare_factors_(loaded.model, specs)
