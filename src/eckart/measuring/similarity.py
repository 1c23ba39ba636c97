"""How much each block changes its input: the cosine between what enters and what leaves it."""

from typing import Any

import torch
from torch import Tensor, nn

from eckart.measuring.scene import Scene
from eckart.model.discovery import Layout
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, split_batches, walk
from eckart.progress import Progress, silent


def observe(scene: Scene, allocator: Any) -> dict[str, float]:
    """For each group the similarity of its first block."""
    similarities = block_similarities(scene.model, scene.layout, scene.windows, progress=scene.progress)
    return {group.name: similarities[group.targets[0].block] for group in scene.groups}


@torch.no_grad()
def block_similarities(
    model: nn.Module, layout: Layout, windows: Tensor, *, progress: Progress = silent
) -> list[float]:
    """Mean over tokens of `cos(x_in, x_out)` for each block; `windows` is `[windows, length]` token ids.

    `1 - cos` is the Block Influence of ShortGPT (arXiv 2403.03853), which CPSVD shares layers by.
    """
    residence = residence_of(model, layout)
    stream = open_stream(model, residence, split_batches(windows))
    result = []
    for at in walk(residence, stream, stage="similarity", progress=progress):
        total = 0.0
        for _, before, after in at.steps(stream):
            total += float(torch.cosine_similarity(before.float(), after.float(), dim=-1).double().sum())
        result.append(total / stream.tokens)
    return result
