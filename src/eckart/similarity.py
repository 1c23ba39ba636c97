"""How much each block changes its input: the cosine between what enters and what leaves it."""

import torch
from torch import nn

from eckart.blocks import open_stream, split_batches
from eckart.discovery import Layout
from eckart.progress import Progress, silent, track

Tensor = torch.Tensor

BATCH_TOKENS = 2048


@torch.no_grad()
def block_similarities(
    model: nn.Module, layout: Layout, windows: Tensor, *, progress: Progress = silent
) -> list[float]:
    """Mean over tokens of `cos(x_in, x_out)` for each block; `windows` is `[windows, length]` token ids.

    `1 - cos` is the Block Influence of ShortGPT (arXiv 2403.03853), which CPSVD shares layers by.
    """
    blocks = layout.block_list(model)
    stream = open_stream(model, blocks, split_batches(windows, BATCH_TOKENS))
    result = []
    for block in track(blocks, "similarity", len(blocks), progress):
        total = 0.0
        for index, hidden, call in stream.inputs():
            after = call.run(block, hidden)
            total += float(torch.cosine_similarity(hidden.float(), after.float(), dim=-1).double().sum())
            stream.hidden[index] = after
        stream.position += 1
        result.append(total / stream.tokens)
    return result
