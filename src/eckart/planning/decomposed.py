"""The groups of a model, each decomposed once: spectra to plan with, and layers at any rank."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn

from eckart.errors import DataError
from eckart.factorizers._each import decompose_each
from eckart.factorizers.base import Factorizer, GroupDecomposition
from eckart.model.discovery import Layout
from eckart.model.experts import PRIOR, opened
from eckart.model.factorise import factorized_layers, packed_layers
from eckart.model.operators import operator
from eckart.model.residence import residence_of
from eckart.model.walk import walk
from eckart.planning.few_bits import FewBits
from eckart.planning.routing import Routing
from eckart.progress import Progress, silent
from eckart.statistics.sums import GroupStatistics, Statistics
from eckart.statistics.sweep import sweep
from eckart.support.memory import give_back
from eckart.types import Entry, Form, Group, Packing, Spectrum

log = logging.getLogger(__name__)


class Decomposed(Mapping[str, GroupDecomposition]):
    """The decompositions of some groups, by name, in their order.

    `left` are the targets of the groups that have none, with the reason in words. `routed` says how many tokens the
    experts saw, None where there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        decompositions: Mapping[str, GroupDecomposition],
        left: Mapping[str, str],
        routed: "Routing | None" = None,
    ) -> None:
        self.model, self.groups = model, [group for group in groups if group.name in decompositions]
        self._decompositions = {group.name: decompositions[group.name] for group in self.groups}
        self.left, self.routed = left, routed
        self.few_bits: dict[str, FewBits] = {}
        self.forms: dict[str, tuple[Form, ...]] = {}

    def __getitem__(self, name: str) -> GroupDecomposition:
        return self._decompositions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decompositions)

    def __len__(self) -> int:
        return len(self._decompositions)

    @property
    def spectra(self) -> list[Spectrum]:
        spectra = [decomposition.spectrum for decomposition in self._decompositions.values()]
        return [self._with_forms(spectrum) for spectrum in spectra]

    def _with_forms(self, spectrum: Spectrum) -> Spectrum:
        """Errors of few bits are known on the text that made them alone, and so cuts beside them are told by it."""
        forms = self.forms.get(spectrum.group.name)
        return spectrum if forms is None else replace(spectrum, forms=forms)

    @property
    def predicts(self) -> bool:
        """Whether the metric says what a cut costs in the model's loss."""
        return all(spectrum.nats is not None for spectrum in self.spectra)

    @property
    def drift(self) -> dict[str, Any]:
        """How far the metric moved over the last quarter of the calibration: the median, and the most with its name."""
        drifts = {name: item.drift for name, item in self._decompositions.items() if item.drift is not None}
        if not drifts:
            return {}
        most = max(drifts, key=drifts.__getitem__)
        return {"median": median(drifts.values()), "most": drifts[most], "most_of": most}

    def settle(self, entries: Sequence[Entry]) -> list[Entry]:
        """Let the decompositions decide what the allocator left to them: preserved columns. Experts have none."""
        return [entry if entry.rank is None else self._settled(entry) for entry in entries]

    def _settled(self, entry: Entry) -> Entry:
        decomposition = self[entry.name]
        if not decomposition.group.of_experts:
            return decomposition.settle(entry)
        return replace(decomposition.settle(replace(entry, kept=0)), kept=entry.kept)

    def cut(self, group: Group, entry: Entry) -> dict[str, nn.Module]:
        """Factorised layers for the members of a group at the entry's rank, by name; none for one that stays dense.

        Pairs, or pairs with preserved columns, whatever the entry's storage (`eckart.model.factorise.store_`).
        """
        if entry.is_dense:
            return {}
        if entry.bits is not None:
            return packed_layers(self.model, group, *self.few_bits[group.name].packed(entry))
        assert entry.rank is not None
        layers: dict[str, nn.Module] = {}
        for members, factors in self[group.name].cuts(entry.rank, entry.kept):
            layers |= factorized_layers(self.model, members, factors)
        return layers

    def drop(self, name: str) -> None:
        """Forget a decomposition, once its factors are in the model for good."""
        del self._decompositions[name]
        self.few_bits.pop(name, None)


def decompose(
    model: nn.Module,
    layout: Layout,
    groups: Sequence[Group],
    factorizer: Factorizer,
    windows: Tensor | None,
    *,
    spill: Path | None = None,
    prior: float = PRIOR,
    packing: Packing | None = None,
    progress: Progress = silent,
) -> Decomposed:
    """Decompose every group once; with `packing` also find out what it would lose in few bits.

    `windows` is `[windows, length]` token ids, or None for a factorizer without needs. A group is decomposed as soon
    as the sweep has passed all its members, and statistics that no other group waits for are dropped at once, so that
    the Grams of one block are in memory, not of all. With `spill`, a folder, decompositions are moved there as they
    are made, and so is what enters each block until gradients have passed. A group with a member that no token
    reached, or no gradient where the factorizer asks for it, has no decomposition; raises `DataError` when that goes
    for all.
    """
    used = factorizer if packing is None else factorizer.judged_by_its_own_text()
    waiting = _Waiting(used, list(groups), spill, packing)
    whole = packing is not None
    with opened(model, layout.targets):
        for statistics in _sweep(model, layout, groups, factorizer, windows, spill, prior, whole, progress):
            waiting.take(statistics, {name: operator(model, name).weight for name in statistics})
            del statistics  # or the Grams of a block would stay while the next one collects its own
            give_back()
    decompositions = waiting.decompositions
    if groups and not decompositions:
        name, reason = next(iter(waiting.left.items()))
        raise DataError(
            f"{name}: {reason}, and so it is with every other layer to compress; calibrate on more text, or on text of "
            "the kind that the model is for."
        )
    notes = Counter(decomposition.note for decomposition in decompositions.values() if decomposition.note)
    for note, count in notes.items():
        log.warning("%s (%d of %d groups)", note, count, len(decompositions))
    decomposed = Decomposed(model, groups, decompositions, waiting.left, Routing.of(layout.targets, waiting.routed))
    decomposed.few_bits, decomposed.forms = waiting.few_bits, waiting.forms
    return decomposed


@dataclass
class _Waiting:
    """Groups of which not every member has been passed yet, what is kept for them, and those that are done."""

    factorizer: Factorizer
    groups: list[Group]
    spill: Path | None
    packing: Packing | None = None
    few_bits: dict[str, FewBits] = field(default_factory=dict)
    forms: dict[str, tuple[Form, ...]] = field(default_factory=dict)
    decompositions: dict[str, GroupDecomposition] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)

    def take(self, statistics: Mapping[str, Statistics], weights: Mapping[str, Tensor]) -> None:
        """Take what belongs to some targets, and decompose every group that waited for nothing else."""
        self.statistics |= statistics
        self.routed |= {name: s.routed for name, s in statistics.items() if s.routed is not None}
        self.weights |= weights
        for group in [group for group in self.groups if all(name in self.weights for name in group.names)]:
            self.groups.remove(group)
            self._decompose(group)
        needed = {name for group in self.groups for name in group.names}
        self.statistics = {name: value for name, value in self.statistics.items() if name in needed}
        self.weights = {name: value for name, value in self.weights.items() if name in needed}

    def _decompose(self, group: Group) -> None:
        collected = tuple(self.statistics[name] for name in group.names) if self.factorizer.needs else ()
        for member in collected:
            if reason := member.unknown:
                self.left |= dict.fromkeys(group.names, reason)
                return
        members = GroupStatistics(collected)
        weights = [self.weights[name] for name in group.names]
        if group.own_bases:
            decomposition: GroupDecomposition = decompose_each(self.factorizer, group, weights, members)
        else:
            decomposition = self.factorizer.decompose(group, weights, members)
        decomposition.drift = members.drift
        if self.packing is not None and not group.of_experts:
            weight = self.weights[group.name]
            left, right = self.factorizer.sides(members, decomposition.details)
            few_bits = self.few_bits[group.name] = FewBits.of(decomposition, weight, left, right)
            self.forms[group.name] = few_bits.forms(self.packing)
            if self.spill is not None:
                few_bits.spill(self.spill)
        decomposition.close()
        if self.spill is not None:
            decomposition.spill(self.spill)
        self.decompositions[group.name] = decomposition


def _sweep(
    model: nn.Module,
    layout: Layout,
    groups: Sequence[Group],
    factorizer: Factorizer,
    windows: Tensor | None,
    spill: Path | None,
    prior: float,
    whole: bool,
    progress: Progress,
) -> Iterator[Mapping[str, Statistics]]:
    """Statistics of one block after another, with its weights at hand; empty ones for a factorizer without needs."""
    if not groups:
        return
    if factorizer.needs:
        assert windows is not None
        sharing = {name for g in groups if whole or (len(g.targets) > 1 and not g.own_bases) for name in g.names}
        how: dict[str, Any] = {"whole_gram": sharing, "whole_gradients": whole, "spill": spill, "prior": prior}
        yield from sweep(model, layout, windows, factorizer.needs, **how, progress=progress)
        return
    for at in walk(residence_of(model, layout), stage="decompose", progress=progress):
        yield {target.name: Statistics() for target in layout.in_block(at.index)}
