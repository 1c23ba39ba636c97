"""Measure the loss of a plan, or of parts of one, by putting factors in the place of weights for a while.

One decomposition of each matrix serves every candidate; nothing is decomposed here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn

from eckart.errors import DataError, NumericalError
from eckart.measuring.held_out import HeldOut
from eckart.measuring.perplexity import perplexity
from eckart.model.walk import Stream, replaced, walk
from eckart.progress import Progress, silent, track
from eckart.support.work import Key, WorkFolder
from eckart.types import Entry, Group, Part

Layers = Mapping[str, nn.Module]  # by the name of the target
Cut = Callable[[Group, Entry], Layers]  # makes the factorised layers of one group, none for an entry that is dense


@dataclass
class SlicingProbe:
    """`probe(entries)` is the mean loss in nats per token on `scoring`, or on `held_out`, each `[windows, length]`.

    `entries` match `groups`; `cut` makes the layers of one group. A loss that is not finite counts as infinite, so
    that a search passes the candidate over. Losses are kept in a work folder, so that a search that was cut short
    measures only what is missing.
    """

    model: nn.Module
    groups: Sequence[Group]
    cut: Cut
    scoring: Tensor
    held_out_windows: Tensor
    folder: WorkFolder
    progress: Progress = silent
    losses: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, entries: Sequence[Entry], held_out: bool = False) -> float:
        choices = [[*e.targets, e.rank, e.storage, e.kept, *([e.bits, e.group] if e.bits else [])] for e in entries]
        piece = Key("candidate", held_out=held_out, choices=choices).digest
        if piece not in self.losses:
            record = self.folder.find(piece)
            if record is None:
                loss = self._measure(entries, self.held_out_windows if held_out else self.scoring)
                self.folder.write(piece, {}, {"loss": loss})
            self.losses[piece] = loss if record is None else float(record[1]["loss"])
        return self.losses[piece]

    def _measure(self, entries: Sequence[Entry], windows: Tensor) -> float:
        stage = f"probe {len(self.losses) + 1}"
        try:
            with in_place(self.model, self.groups, entries, self.cut):
                return perplexity(self.model, list(windows), progress=self.progress, stage=stage).nll
        except NumericalError:
            return inf


@contextmanager
def in_place(model: nn.Module, groups: Sequence[Group], entries: Sequence[Entry], cut: Cut) -> Iterator[None]:
    """The factors of a plan in the model, for as long as the context lasts; then the dense layers again."""
    layers: dict[str, nn.Module] = {}
    for group, entry in zip(groups, entries, strict=True):
        layers |= cut(group, entry)
    with replaced(model, layers):
        yield


@torch.no_grad()
def measure_parts(
    model: nn.Module,
    groups: Sequence[Group],
    entries: Sequence[Entry],
    cut: Cut,
    held_out: HeldOut,
    parts: Sequence[Part],
    progress: Progress = silent,
) -> list[float]:
    """The KL in nats per token of the dense `model` with the cuts of each part in place; the model stays as it was.

    `entries` of `groups` are the plan. All parts walk side by side in one pass over the blocks, each on a stream of its
    own from its first cut on: that is `[windows, length, width]` for every part. The layers of a block are made once.
    """
    cuts = [(group, entry) for group, entry in zip(groups, entries, strict=True) if not entry.is_dense]
    dense, streams = held_out.stream(), dict[int, Stream]()
    replacements: dict[str, nn.Module] = {}
    for at in walk(held_out.residence, dense, stage="probe", progress=progress):
        for group, entry in cuts:
            if group.targets[0].block == at.index:
                replacements |= cut(group, entry)
        here = {t.name: g.name for g, _ in cuts for t in g.targets if t.block == at.index}
        for number, part in enumerate(parts):
            layers = {name: replacements[name] for name, group in here.items() if group in part}
            if layers and number not in streams:
                streams[number] = dense.branch()
            if number in streams:
                with replaced(model, layers):
                    at.advance(streams[number])
        for name in here:
            del replacements[name]
    finals = [streams.get(number, dense).states for number in range(len(parts))]
    return [held_out.kl_of(states) for states in track(finals, "divergence", len(finals), progress)]


def split_for_search(windows: Tensor, scoring: int, held_out: int) -> tuple[Tensor, Tensor]:
    """The first `scoring` windows and, apart from them, the last `held_out`; fewer where there are too few.

    Raises `DataError` for fewer than two windows.
    """
    if len(windows) < 2:
        raise DataError(f"{len(windows)} windows, but a search holds some out; calibrate on two at least.")
    aside = min(held_out, max(1, len(windows) // 4))
    return windows[: min(scoring, len(windows) - aside)], windows[len(windows) - aside :]
