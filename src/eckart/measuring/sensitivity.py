"""Module sensitivity by perturbation: how far the model's output moves when one module is cut alone.

All groups rest at the uniform share (plain cuts); one at a time is moved through candidate shares, and
`KL(dense || perturbed)` of the final logits is measured (Duo-SVD, arXiv 2510.19385 v2, step 2). The
sum of the single changes predicts the KL of a whole plan.

It is the whole cost of the method, so: the resting model's inputs of each block are kept and only the
blocks behind a perturbed module run; the dense reference is read once for all shares of a module; a
share that is the resting one is not run at all; and results are journalled as they come, so that an
interrupted run resumes. Cost: one evaluation runs half the model on average and its head once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart import ledger
from eckart.measuring.divergence import Divergence
from eckart.measuring.probes import Cut
from eckart.measuring.scene import Scene
from eckart.model.discovery import Layout
from eckart.model.residence import Residence, residence_of
from eckart.model.walk import Stream, open_stream, pass_blocks, replaced, split_batches, walk
from eckart.progress import Progress, silent
from eckart.support.work import Journal, Key
from eckart.types import Budget, Entry, Group

VERSION = 3  # of the algorithm: a change that changes its numbers makes old journals void
RESTING = ""  # the name of no group


@dataclass(frozen=True)
class Curves:
    """Measured KL in nats per token.

    `losses[group name][share]` is for the model with that group at that share (1.0: dense) and every
    other one at `target`; `resting` is for all of them at `target`.
    """

    target: float
    resting: float
    losses: Mapping[str, Mapping[float, float]]

    def excess(self, name: str) -> dict[float, float]:
        """`{share: KL - resting KL}` of a group; negative above the target share."""
        return {share: loss - self.resting for share, loss in self.losses[name].items()}


def observe(scene: Scene, allocator: Any) -> Mapping[str, Mapping[float, float]]:
    """The curve of every group, at the shares `allocator.probed`, with all others at the share of the plan."""
    return curves_of(scene, allocator, scene.keep, allocator.probed)


def curves_of(
    scene: Scene, allocator: Any, target: float, shares: Sequence[float]
) -> Mapping[str, Mapping[float, float]]:
    """The curve of every group at some shares, with all others at the share `target`.

    Measured on the first `allocator.windows` windows of the calibration, cut to `allocator.length` tokens.
    """
    curves = measure_curves(
        scene.model,
        scene.layout,
        scene.groups,
        scene.cut,
        scene.windows[: allocator.windows, : allocator.length],
        target,
        work=scene.work,
        depends=scene.depends,
        shares=shares,
        storage=scene.storage,
        progress=scene.progress,
    )
    return curves.losses


@torch.no_grad()
def measure_curves(
    model: nn.Module,
    layout: Layout,
    groups: Sequence[Group],
    cut: Cut,
    windows: Tensor,
    target: float,
    *,
    work: Path,
    depends: Mapping[str, Any],
    shares: Sequence[float],
    storage: str = "pair",
    only: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Curves:
    """Measure every group at every share (and at `target`); the model is left as it was.

    `cut` makes the layers of a group at a rank. `windows` is `[windows, length]` token ids. `work` is the folder of
    the journal and `depends` what decides the cuts (data, factorizer, their options); the weights, the windows and
    the arguments here are added to it. `storage` prices the ranks of the shares. `only` measures just these
    groups. Raises `NumericalError` when the model's output is not finite.
    """
    shares = sorted({*shares, target})
    names = [group.names for group in groups]
    key = {"version": VERSION, "weights": model, "windows": windows, "target": target, "storage": storage}
    journal = Journal(work, Key("sensitivity", **depends, **key, blocks=layout.blocks, groups=names))
    selection = [group for group in groups if only is None or group.name in only]
    measurements = _Measurements(model, residence_of(model, layout), groups, cut, journal, target, storage)
    measurements.add(windows, [(group, share) for group in selection for share in shares], progress)
    losses = {group.name: {share: measurements.kl[group.name, share] for share in shares} for group in selection}
    return Curves(target, measurements.kl[RESTING, target], losses)


def _is_measurement(row: Mapping[str, Any]) -> bool:
    """Whether a row of a journal is one of ours; a damaged one of version 0.1, which has no checksum, may not be."""
    return (
        isinstance(row.get("group"), str)
        and isinstance(row.get("share"), int | float)
        and isinstance(row.get("kl"), int | float)
    )


class _Measurements:
    """What has been measured: `kl[group name, share]`; `kl[RESTING, target]` is of the resting model."""

    def __init__(
        self,
        model: nn.Module,
        residence: Residence,
        groups: Sequence[Group],
        cut: Cut,
        journal: Journal,
        target: float,
        storage: str,
    ) -> None:
        self.model, self.residence, self.groups, self.cut = model, residence, groups, cut
        self.journal, self.target, self.storage = journal, target, storage
        self.dense = {name: model.get_submodule(name) for group in groups for name in group.names}
        self.kl = {(row["group"], row["share"]): row["kl"] for row in journal.rows if _is_measurement(row)}

    def add(self, windows: Tensor, pairs: Sequence[tuple[Group, float]], progress: Progress) -> None:
        """Measure those pairs that have not been measured yet."""
        missing = [(g, s) for g, s in pairs if (g.name, s) not in self.kl and s != self.target]
        if missing or (RESTING, self.target) not in self.kl:
            start = open_stream(self.model, self.residence, split_batches(windows))
            divergence = Divergence(self.model, self.residence, pass_blocks(self.residence, start.branch()))
            resting: dict[str, nn.Module] = {}
            for group in self.groups:
                resting |= self._layers(group, self.target)
            with replaced(self.model, resting):
                self._walk(start, divergence, missing, progress)
        for group, share in pairs:
            if share == self.target:
                self.kl[group.name, share] = self.kl[RESTING, self.target]

    def _walk(
        self, stream: Stream, divergence: Divergence, missing: Sequence[tuple[Group, float]], progress: Progress
    ) -> None:
        """Take the resting model's states from block to block; at each, measure the groups that begin there."""
        done = 0
        for at in walk(self.residence, stream):
            for group, share in missing:
                if min(target.block for target in group.targets) == at.index:
                    progress("sensitivity", done, len(missing))
                    with replaced(self.model, self._layers(group, share)):
                        perturbed = pass_blocks(self.residence, stream.branch())
                    self._record(group, share, divergence(perturbed.states))
                    done += 1
        if (RESTING, self.target) not in self.kl:
            self._record(None, self.target, divergence(stream.states))
        progress("sensitivity", done, len(missing))

    def _record(self, group: Group | None, share: float, value: float) -> None:
        name = RESTING if group is None else group.name
        rank = None if group is None else self._rank(group, share)
        self.journal.add({"group": name, "share": share, "rank": rank, "kl": value})
        self.kl[name, share] = value

    def _rank(self, group: Group, share: float) -> int | None:
        return ledger.rank_for(group, share, Budget(share, storage=self.storage))

    def _layers(self, group: Group, share: float) -> dict[str, nn.Module]:
        """The layers of a group that keeps a share, by name: dense ones or factorised ones."""
        rank = self._rank(group, share)
        if rank is None:
            return {name: self.dense[name] for name in group.names}
        with replaced(self.model, {name: self.dense[name] for name in group.names}):  # cuts take the place of weights
            return dict(self.cut(group, Entry(group.names, rank)))
