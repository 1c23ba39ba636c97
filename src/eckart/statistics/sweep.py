"""Collect statistics of the targets, block by block, in one pass over the calibration windows.

Forward: each block runs once on every batch; what enters its linear maps is seen. Maps that are called with the very
same tensor share one Gram.

Backward (only if a gradient statistic is needed): the forward run keeps what enters each block, for
all blocks and windows (blocks * tokens * width numbers), and no more. Then the gradient of the loss
enters at the last block and each block is recomputed once, from the last to the first, collecting
inputs and gradients together, so that the Grams of one block are in memory, not of all. No weight
gradient is ever formed by autograd.
"""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.model.discovery import Layout
from eckart.model.recorder import Recorder
from eckart.model.residence import residence_of
from eckart.model.walk import BATCH_TOKENS, At, Stream, open_stream, split_batches, walk
from eckart.progress import Progress, silent
from eckart.statistics.at_inputs import collect_input, finish_inputs
from eckart.statistics.at_outputs import Backward, backward_block, check_labels, loss_gradients
from eckart.statistics.sums import GRADIENT_NEEDS, Need, Statistics, mark_three_quarters
from eckart.types import Target


@torch.no_grad()
def sweep(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    needs: Iterable[Need],
    *,
    whole_gram: Collection[str] = (),
    whole_gradients: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> Iterator[dict[str, Statistics]]:
    """Yield `{target name: statistics}` for one block after another, with the weights of that block at hand.

    `windows` is `[windows, length]` token ids. Blocks come in forward order, or in backward order if
    a gradient statistic is among the needs. `seed` draws labels that are not the text's.
    `whole_gram` names targets that get their input Gram even where their output Gram is smaller: those
    that will share a basis, or be rounded. With `whole_gradients` tall matrices get the gradient Gram at their output.
    Raises `NumericalError` naming the module where NaN or infinity first appears.
    """
    needs = frozenset(needs)
    check_labels(needs)
    if needs & GRADIENT_NEEDS:
        options = {"batch_tokens": batch_tokens, "seed": seed}
        for here in backward(model, layout, windows, needs, **options, progress=progress):
            yield backward_block(here.block, layout.in_block(here.index), here, needs, whole_gram, whole_gradients)
        return
    residence = residence_of(model, layout)
    stream = open_stream(model, residence, split_batches(windows, batch_tokens))
    for at in walk(residence, stream, stage="calibrate", progress=progress):
        yield _forward_block(f"{layout.blocks}.{at.index}", at, layout.in_block(at.index), stream, needs, whole_gram)


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
) -> Iterator[Backward]:
    """Yield one block after another, from the last to the first; the caller moves the gradients past each.

    `windows`, `seed` and the labels among the `needs` are those of `sweep`.
    """
    residence = residence_of(model, layout)
    stream = open_stream(model, residence, split_batches(windows, batch_tokens))
    entrances = []
    for at in walk(residence, stream, stage="calibrate", progress=progress):
        entrances.append(stream.states.snapshot())
        _forward_block(f"{layout.blocks}.{at.index}", at, [], stream, frozenset())
    gradients = loss_gradients(model, residence, stream, needs, seed, progress)
    for at in walk(residence, backward=True, stage="gradients", progress=progress):
        calls = [of_batch[at.index] for of_batch in stream.calls]
        yield Backward(at.index, at.block, entrances.pop(), calls, gradients)


def _forward_block(
    name: str,
    at: At,
    targets: list[Target],
    stream: Stream,
    needs: frozenset[Need],
    whole_gram: Collection[str] = (),
) -> dict[str, Statistics]:
    """Run one block on every batch, collect, and move the stream past it."""
    result = {target.name: Statistics() for target in targets}
    with Recorder(at.block, targets) as recorder:
        for batch, _, _ in at.steps(stream):
            for x, members in recorder.by_input():
                collect_input(x, members, at.block, result, needs, whole_gram)
            mark_three_quarters(result.values(), batch + 1, len(stream.batches))
    for target in targets:
        finish_inputs(target, result[target.name], needs)
    if not all(bool(torch.isfinite(state).all()) for state in stream.states):
        raise NumericalError(f"{name}: its output holds NaN or infinity; calibrate in float32 or bfloat16.")
    return result
