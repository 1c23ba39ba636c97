"""Decompose every group of a model once."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from eckart.discovery import Layout
from eckart.factorizers.base import Factorizer, GroupDecomposition
from eckart.linear import weight_view
from eckart.progress import Progress, silent, track
from eckart.statistics import GroupStatistics, Statistics
from eckart.sweep import sweep
from eckart.types import Group

Tensor = torch.Tensor
log = logging.getLogger(__name__)


def decompose(
    model: nn.Module,
    layout: Layout,
    groups: Sequence[Group],
    factorizer: Factorizer,
    windows: Tensor | None,
    *,
    progress: Progress = silent,
) -> dict[str, GroupDecomposition]:
    """Decompose every group once; `{group name: decomposition}`.

    `windows` is `[windows, length]` token ids, or None for a factorizer without needs. A group is
    decomposed as soon as the sweep has passed all its members, and statistics that no other group
    waits for are dropped at once, so that the Grams of one block are in memory, not of all.
    """
    done: dict[str, GroupDecomposition] = {}
    if not factorizer.needs or not groups:
        for group in track(groups, "decompose", len(groups), progress):
            weights = [weight_view(model.get_submodule(name)) for name in group.names]
            done[group.name] = factorizer.decompose(group, weights, GroupStatistics())
        return done
    assert windows is not None
    statistics: dict[str, Statistics] = {}
    waiting = list(groups)
    sharing = {name for group in groups if len(group.targets) > 1 for name in group.names}
    for per_block in sweep(model, layout, windows, factorizer.needs, whole_gram=sharing, progress=progress):
        statistics.update(per_block)
        ready = [group for group in waiting if all(name in statistics for name in group.names)]
        for group in ready:
            weights = [weight_view(model.get_submodule(name)) for name in group.names]
            members = GroupStatistics(tuple(statistics[name] for name in group.names))
            done[group.name] = factorizer.decompose(group, weights, members)
            done[group.name].drift = members.drift
        waiting = [group for group in waiting if group.name not in done]
        needed = {name for group in waiting for name in group.names}
        statistics = {name: value for name, value in statistics.items() if name in needed}
    for note, count in Counter(made.note for made in done.values() if made.note).items():
        log.warning("%s (%d of %d groups)", note, count, len(done))
    return done


def drift_of(decompositions: Mapping[str, GroupDecomposition]) -> dict[str, Any]:
    """How far the metric moved over the last quarter of the calibration: the median, and the most with its name."""
    known = {name: made.drift for name, made in decompositions.items() if made.drift is not None}
    if not known:
        return {}
    most = max(known, key=known.__getitem__)
    return {"median": median(known.values()), "most": known[most], "most_of": most}
