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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.model.discovery import Layout
from eckart.model.experts import PRIOR, opened
from eckart.model.recorder import Recorder
from eckart.model.residence import residence_of
from eckart.model.store import Spilled, Store
from eckart.model.walk import BATCH_TOKENS, At, Stream, open_stream, split_batches, walk
from eckart.progress import Progress, silent
from eckart.statistics.at_inputs import collect_input, finish_inputs
from eckart.statistics.at_outputs import backward_block, check_labels, loss_gradients
from eckart.statistics.recomputed import Backward
from eckart.statistics.routed import readers, settle_, weighs_by_gates
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
    spill: Path | None = None,
    prior: float = PRIOR,
    progress: Progress = silent,
) -> Iterator[dict[str, Statistics]]:
    """Yield `{target name: statistics}` for one block after another, with the weights of that block at hand.

    `windows` is `[windows, length]` token ids. Blocks come in forward order, or in backward order if a gradient
    statistic is among the needs. `seed` draws labels that are not the text's. `whole_gram` names targets that get
    their input Gram even where their output Gram is smaller: those that will share a basis, or be rounded. With
    `whole_gradients` tall matrices get the gradient Gram at their output. With `spill`, a folder, what enters each
    block waits there for the backward run. `prior` is how far statistics of experts are taken from their layers'
    (`eckart.statistics.routed`). Raises `NumericalError` naming the module where NaN or infinity first appears.
    """
    needs = frozenset(needs)
    check_labels(needs)
    with opened(model, layout.targets):
        if needs & GRADIENT_NEEDS:
            how: dict[str, Any] = {"batch_tokens": batch_tokens, "seed": seed, "spill": spill, "progress": progress}
            for here in backward(model, layout, windows, needs, **how):
                targets = layout.in_block(here.index)
                yield backward_block(here.block, targets, here, needs, whole_gram, whole_gradients, prior)
            return
        residence = residence_of(model, layout)
        stream = open_stream(model, residence, split_batches(windows, batch_tokens))
        for at in walk(residence, stream, stage="calibrate", progress=progress):
            name, targets = f"{layout.blocks}.{at.index}", layout.in_block(at.index)
            yield _forward_block(name, at, targets, stream, needs, whole_gram, prior)


@torch.no_grad()
def backward(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    needs: frozenset[Need],
    *,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    spill: Path | None = None,
    progress: Progress = silent,
) -> Iterator[Backward]:
    """Yield one block after another, from the last to the first; the caller moves the gradients past each.

    `windows`, `seed`, `spill` and the labels among the `needs` are those of `sweep`.
    """
    residence = residence_of(model, layout)
    stream = open_stream(model, residence, split_batches(windows, batch_tokens))
    entrances: list[Store | Spilled] = []
    carried = []
    for at in walk(residence, stream, stage="calibrate", progress=progress):
        states = stream.states
        entrances.append(
            states.snapshot() if spill is None else states.spilled(spill / f"entrance-{at.index}.safetensors")
        )
        carried.append(list(stream.carried))
        _forward_block(f"{layout.blocks}.{at.index}", at, [], stream, frozenset())
    gradients = loss_gradients(model, residence, stream, needs, seed, progress)
    at_carried: list[list[Tensor | None]] = [[] for _ in stream.batches]  # nothing reads what the last block leaves
    for at in walk(residence, backward=True, stage="gradients", progress=progress):
        calls = [of_batch[at.index] for of_batch in stream.calls]
        entrance = entrances.pop()
        yield Backward(at.index, at.block, entrance, calls, gradients, carried.pop(), at_carried)
        if isinstance(entrance, Spilled):
            entrance.drop()


def _forward_block(
    name: str,
    at: At,
    targets: list[Target],
    stream: Stream,
    needs: frozenset[Need],
    whole_gram: Collection[str] = (),
    prior: float = PRIOR,
) -> dict[str, Statistics]:
    """Run one block on every batch, collect, and move the stream past it."""
    result = {target.name: Statistics() for target in targets}
    whole_gram = {*whole_gram, *readers(at.block, targets)}
    with Recorder(at.block, targets) as recorder:
        for batch, _, _ in at.steps(stream):
            for x, members in recorder.by_input(gated=weighs_by_gates(needs)):
                collect_input(x, members, at.block, result, needs, whole_gram)
            mark_three_quarters(result.values(), batch + 1, len(stream.batches))
    for target in targets:
        finish_inputs(target, result[target.name], needs)
    settle_(at.block, targets, result, needs, prior)
    if not all(bool(torch.isfinite(state).all()) for state in stream.states):
        raise NumericalError(f"{name}: its output holds NaN or infinity; calibrate in float32 or bfloat16.")
    return result
