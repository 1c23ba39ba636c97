"""The loss of a candidate plan: slice the stored decompositions, run the model, put the dense layers back.

One decomposition of each matrix serves every candidate; nothing is decomposed here. Losses are kept in
a work folder, so that a search that was cut short measures only what is missing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

import torch
from torch import nn

from eckart.errors import DataError, NumericalError
from eckart.linear import swap_
from eckart.measure import perplexity
from eckart.progress import Progress, silent
from eckart.types import Entry, Group
from eckart.work import WorkFolder, fingerprint

Tensor = torch.Tensor
Put = Callable[[nn.Module, Group, Entry], None]


@dataclass
class SlicingProbe:
    """`probe(entries)` is the mean loss in nats per token on `scoring`, or on `held_out`, each `[windows, length]`.

    `entries` match `groups`; `put` puts the factors of one group into the model. A loss that is not
    finite is infinite, so that a search passes the candidate over.
    """

    model: nn.Module
    groups: Sequence[Group]
    put: Put
    scoring: Tensor
    held_out_windows: Tensor
    folder: WorkFolder
    progress: Progress = silent
    known: dict[str, float] = field(default_factory=dict, init=False)

    def __call__(self, entries: Sequence[Entry], held_out: bool = False) -> float:
        ranks = [[*entry.targets, entry.rank, entry.storage] for entry in entries]
        piece = fingerprint({"held_out": held_out, "ranks": ranks})
        if piece not in self.known:
            found = self.folder.find(piece)
            if found is None:
                loss = self._measure(entries, self.held_out_windows if held_out else self.scoring)
                self.folder.keep(piece, {}, {"loss": loss})
            self.known[piece] = loss if found is None else float(found[1]["loss"])
        return self.known[piece]

    def _measure(self, entries: Sequence[Entry], windows: Tensor) -> float:
        stage = f"probe {len(self.known) + 1}"
        try:
            with in_place(self.model, self.groups, entries, self.put):
                return perplexity(self.model, list(windows), progress=self.progress, stage=stage).nll
        except NumericalError:
            return inf


@contextmanager
def in_place(model: nn.Module, groups: Sequence[Group], entries: Sequence[Entry], put: Put) -> Iterator[None]:
    """The factors of a plan in the model by `put`, for as long as the context lasts; then the dense layers again."""
    names = [name for entry in entries if entry.rank is not None for name in entry.targets]
    dense = {name: model.get_submodule(name) for name in names}
    try:
        for group, entry in zip(groups, entries, strict=True):
            if entry.rank is not None:
                put(model, group, entry)
        yield
    finally:
        for name, module in dense.items():
            swap_(model, name, module)


def split_for_search(windows: Tensor, scoring: int, held_out: int) -> tuple[Tensor, Tensor]:
    """The first `scoring` windows and, apart from them, the last `held_out`; fewer where there are too few.

    Raises `DataError` for fewer than two windows.
    """
    if len(windows) < 2:
        raise DataError(f"{len(windows)} windows, but a search holds some out; calibrate on two at least.")
    aside = min(held_out, max(1, len(windows) // 4))
    return windows[: min(scoring, len(windows) - aside)], windows[len(windows) - aside :]
