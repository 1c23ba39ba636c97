"""Matrices that share a rank and nothing else, decomposed one by one: the experts of a layer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from eckart.factorizers.base import Factorizer, GroupDecomposition
from eckart.statistics.sums import GroupStatistics
from eckart.types import Entry, Factors, Group, Spectrum


class EachDecomposition(GroupDecomposition):
    """The decompositions of the members of a group with own bases; a cut at a rank cuts each there.

    Its spectrum is of all members: what a cut loses in the metric is the sum over them, in nats per token if the
    metric knows them.
    """

    def __init__(self, group: Group, parts: Sequence[GroupDecomposition]) -> None:
        self.group, self.parts = group, list(parts)
        self.details = {}
        notes = [part.note for part in parts if part.note]
        self.note = notes[0] if notes else None
        predicted = [part.spectrum.nats for part in parts]
        known = [nats for nats in predicted if nats is not None]
        weights = known if len(known) == len(predicted) else [1.0] * len(parts)
        squares = sum(w * part.spectrum.values.square() for w, part in zip(weights, parts, strict=True))
        assert isinstance(squares, Tensor)
        unseen = [part.spectrum.unseen for part in parts]
        judged = [tails for tails in unseen if tails is not None]
        summed = sum(w * tails for w, tails in zip(weights, judged, strict=True)) if len(judged) == len(parts) else None
        if not isinstance(summed, Tensor):  # one expert without tokens to be judged by: all by their own
            for part in parts:
                part.spectrum = replace(part.spectrum, unseen=None)
            summed = None
        self.spectrum = Spectrum(group, squares.sqrt(), 1.0 if known else None, unseen=summed)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def spill(self, folder: Path) -> None:
        for part in self.parts:
            part.spill(folder)

    def settle(self, entry: Entry) -> Entry:
        return entry

    @property
    def apart(self) -> list[Spectrum]:
        return [part.spectrum for part in self.parts]

    def cuts(self, rank: int, kept: int | None = None) -> list[tuple[Group, Factors]]:
        return [cut for part in self.parts for cut in part.cuts(rank, kept)]

    def truncate(self, rank: int, kept: int | None = None) -> Factors:
        raise TypeError(f"{self.group.name}: its members have a basis each; ask for their cuts.")


def decompose_each(
    factorizer: Factorizer, group: Group, weights: Sequence[Tensor], statistics: GroupStatistics
) -> EachDecomposition:
    """Decompose the weights `[out, in]` of a group with own bases, each in its own metric."""
    own = [GroupStatistics((member,)) for member in statistics.members] or [GroupStatistics()] * len(weights)
    members = [Group((target,)) for target in group.targets]
    return EachDecomposition(
        group, [factorizer.decompose(*one) for one in zip(members, ([w] for w in weights), own, strict=True)]
    )
