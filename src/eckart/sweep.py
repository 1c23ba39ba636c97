"""Collect statistics of the targets, block by block, in one pass over the calibration windows.

Forward: each block runs once on every batch; hooks see the inputs of its linear layers. Linears that
are called with the very same tensor share one Gram.

Backward (only if a gradient statistic is needed): the forward run keeps what enters each block, for
all blocks and windows (blocks * tokens * width numbers), and no more. Then the gradient of the loss
enters at the last block and each block is recomputed once, from the last to the first, collecting
inputs and gradients together, so that the Grams of one block are in memory, not of all. No weight
gradient is ever formed by autograd.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from eckart.blocks import Call, Stream, open_stream, split_batches
from eckart.discovery import Layout
from eckart.errors import NumericalError
from eckart.gradient_statistics import backward_block, check_labels, loss_gradients
from eckart.input_statistics import collect_input, finish_inputs
from eckart.progress import Progress, silent, track
from eckart.recorder import Recorder
from eckart.statistics import GRADIENT_NEEDS, Need, Statistics, mark_three_quarters
from eckart.types import Target

Tensor = torch.Tensor

BATCH_TOKENS = 2048


@torch.no_grad()
def sweep(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    needs: Iterable[Need],
    *,
    whole_gram: Collection[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[dict[str, Statistics]]:
    """Yield `{target name: statistics}` for one block after another.

    `windows` is `[windows, length]` token ids. Blocks come in forward order, or in backward order if
    a gradient statistic is among the needs. `seed` draws labels that are not the text's.
    `whole_gram` names targets that get their input Gram even where their output Gram is smaller: those
    that will share a basis. Raises `NumericalError` naming the module where NaN or infinity first appears.
    """
    needs = frozenset(needs)
    check_labels(needs)
    blocks = layout.block_list(model)
    targets = [[t for t in layout.targets if t.block == index] for index in range(len(blocks))]
    if not needs & GRADIENT_NEEDS:
        stream = open_stream(model, blocks, split_batches(windows, batch_tokens))
        for index in track(range(len(blocks)), "calibrate", len(blocks), progress):
            yield _forward_block(f"{layout.blocks}.{index}", blocks[index], targets[index], stream, needs, whole_gram)
        return
    for at in backward(model, layout, windows, needs, batch_tokens=batch_tokens, seed=seed, progress=progress):
        block, here = blocks[at.index], targets[at.index]
        yield backward_block(block, here, at.entrances, at.calls, at.gradients, needs, whole_gram)


@dataclass(frozen=True)
class AtBlock:
    """Where a backward run is, batch by batch: what enters block `index`, how it is called, the loss gradients.

    `gradients[i]` `[batch, seq, width]` is at the block's output; `backward_block` moves it to the entrance.
    """

    index: int
    entrances: list[Tensor]
    calls: list[Call]
    gradients: list[Tensor]


@torch.no_grad()
def backward(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    needs: frozenset[Need],
    *,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[AtBlock]:
    """Yield one block after another, from the last to the first; the caller moves the gradients past each.

    `windows`, `seed` and the labels among the `needs` are those of `sweep`.
    """
    blocks = layout.block_list(model)
    stream = open_stream(model, blocks, split_batches(windows, batch_tokens))
    entrances = []
    for index in track(range(len(blocks)), "calibrate", len(blocks), progress):
        entrances.append(list(stream.hidden))
        _forward_block(f"{layout.blocks}.{index}", blocks[index], [], stream, frozenset())
    gradients = loss_gradients(model, blocks, stream, needs, seed, progress)
    for index in track(reversed(range(len(blocks))), "gradients", len(blocks), progress):
        yield AtBlock(index, entrances.pop(), [per_batch[index] for per_batch in stream.calls], gradients)


def _forward_block(
    name: str,
    block: nn.Module,
    targets: Sequence[Target],
    stream: Stream,
    needs: frozenset[Need],
    whole_gram: Collection[str] = (),
) -> dict[str, Statistics]:
    """Run one block on every batch, collect, and move the stream past it."""
    result = {target.name: Statistics() for target in targets}
    with Recorder(block, targets) as recorder:
        for index, hidden, call in stream.inputs():
            stream.hidden[index] = call.run(block, hidden)
            for x, members in recorder.by_input():
                collect_input(x, members, block, result, needs, whole_gram)
            mark_three_quarters(result.values(), index + 1, len(stream.batches))
    stream.position += 1
    for target in targets:
        finish_inputs(target, result[target.name], needs)
    if not all(bool(torch.isfinite(hidden).all()) for hidden in stream.hidden):
        raise NumericalError(f"{name}: its output holds NaN or infinity; calibrate in float32 or bfloat16.")
    return result
