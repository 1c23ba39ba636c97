"""Collect statistics of the targets, block by block, in one pass over the calibration windows.

Forward: each block runs once on every batch; hooks see the inputs of its linear layers. Linears that
are called with the very same tensor share one Gram. Backward (only if a gradient statistic is
needed): the gradient of the loss enters at the last block and each block is recomputed once, from
the last to the first; no weight gradient is ever formed by autograd.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from eckart.blocks import Call, Stream, open_stream, run_tail, split_batches
from eckart.discovery import Layout
from eckart.errors import NumericalError
from eckart.progress import Progress, silent, track
from eckart.statistics import Gram, Need, Statistics
from eckart.types import Target

Tensor = torch.Tensor

BATCH_TOKENS = 2048
GRADIENT_NEEDS = frozenset({Need.WEIGHT_FISHER})


@torch.no_grad()
def sweep(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    needs: Iterable[Need],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
) -> Iterator[dict[str, Statistics]]:
    """Yield `{target name: statistics}` for one block after another.

    `windows` is `[windows, length]` token ids. Blocks come in forward order, or in backward order if
    a gradient statistic is among the needs. Raises `NumericalError` naming the module where NaN or
    infinity first appears.
    """
    needs = frozenset(needs)
    blocks = layout.block_list(model)
    targets = [[t for t in layout.targets if t.block == index] for index in range(len(blocks))]
    stream = open_stream(model, blocks, split_batches(windows, batch_tokens))
    if not needs & GRADIENT_NEEDS:
        for index in track(range(len(blocks)), "calibrate", len(blocks), progress):
            yield _forward_block(blocks[index], targets[index], stream, needs)
        return
    entrances, collected = [], []
    for index in track(range(len(blocks)), "calibrate", len(blocks), progress):
        entrances.append(list(stream.hidden))
        collected.append(_forward_block(blocks[index], targets[index], stream, needs))
    gradients = _loss_gradients(model, blocks, stream, progress)
    for index in track(reversed(range(len(blocks))), "gradients", len(blocks), progress):
        calls = [per_batch[index] for per_batch in stream.calls]
        _backward_block(blocks[index], targets[index], entrances.pop(), calls, gradients, collected[index])
        yield collected[index]


class _Recorder:
    """Hooks that keep the inputs (and outputs) of a block's linear layers during one run."""

    def __init__(self, block: nn.Module, targets: Sequence[Target]) -> None:
        self.seen: list[tuple[Target, Tensor, Tensor]] = []
        self.handles = [
            block.get_submodule(target.kind).register_forward_hook(self._hook(target)) for target in targets
        ]

    def _hook(self, target: Target):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.append((target, args[0], output))

        return hook

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def by_input(self) -> list[tuple[Tensor, list[tuple[Target, Tensor]]]]:
        """The recorded calls, gathered by the identity of their input tensor, then forgotten."""
        sets: dict[tuple[object, ...], tuple[Tensor, list[tuple[Target, Tensor]]]] = {}
        for target, x, y in self.seen:
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            sets.setdefault(key, (x, []))[1].append((target, y))
        self.seen = []
        return list(sets.values())


def _forward_block(
    block: nn.Module, targets: Sequence[Target], stream: Stream, needs: frozenset[Need]
) -> dict[str, Statistics]:
    """Run one block on every batch, collect, and move the stream past it."""
    result = {target.name: Statistics() for target in targets}
    with _Recorder(block, targets) as recorder:
        for index, hidden, call in stream.inputs():
            stream.hidden[index] = call.run(block, hidden)
            for x, members in recorder.by_input():
                _collect_input(x, members, block, result, needs)
    stream.position += 1
    for target in targets:
        _finish(target, result[target.name], needs)
    if not all(bool(torch.isfinite(hidden).all()) for hidden in stream.hidden):
        name = targets[0].name.removesuffix("." + targets[0].kind) if targets else "a block"
        raise NumericalError(f"{name}: its output holds NaN or infinity; calibrate in float32 or bfloat16.")
    return result


def _collect_input(
    x: Tensor,
    members: Sequence[tuple[Target, Tensor]],
    block: nn.Module,
    result: dict[str, Statistics],
    needs: frozenset[Need],
) -> None:
    """Add one input tensor `[batch, seq, in]` to the statistics of the linears that read it."""
    x = x.reshape(-1, x.shape[-1])
    leader = result[members[0][0].name]
    if leader.tokens == 0:
        _choose_grams(members, result, needs, x.device)
    grams = {id(g): g for g in (result[t.name].input_gram for t, _ in members) if g is not None}
    for gram in grams.values():
        gram.add_(x)
    energy = float(x.float().square().sum(dtype=torch.float64)) / x.shape[-1] if needs else 0.0
    absolute = x.abs().sum(0, dtype=torch.float64) if Need.INPUT_ABSMEAN in needs else None
    for target, y in members:
        statistics = result[target.name]
        statistics.tokens += x.shape[0]
        statistics.input_energy += energy
        if absolute is not None:
            before = statistics.input_absmean
            statistics.input_absmean = absolute if before is None else before + absolute
        if statistics.output_gram is not None:
            bias: Tensor | None = block.get_submodule(target.kind).bias  # type: ignore[assignment]
            statistics.output_gram.add_(y if bias is None else y - bias)


def _choose_grams(
    members: Sequence[tuple[Target, Tensor]],
    result: dict[str, Statistics],
    needs: frozenset[Need],
    device: torch.device,
) -> None:
    """Give the linears that share an input one input Gram, or an output Gram each if that is smaller.

    Only a wide or square matrix can do with its output Gram (identities 1 and 2: with out <= in the
    eigenproblem of `W H W^T` is the smaller one).
    """
    if not needs & {Need.INPUT_GRAM, Need.SMALLER_GRAM}:
        return
    targets = [target for target, _ in members]
    width = targets[0].in_features
    tall = any(t.out_features > t.in_features for t in targets)
    cheaper = sum(t.out_features**2 for t in targets) < width**2
    if Need.INPUT_GRAM not in needs and not tall and cheaper:
        for target in targets:
            result[target.name].output_gram = Gram(target.out_features, device)
        return
    shared = Gram(width, device)
    for target in targets:
        result[target.name].input_gram = shared


def _finish(target: Target, statistics: Statistics, needs: frozenset[Need]) -> None:
    """Turn sums into means where the statistic is a mean, and check that everything is finite."""
    if statistics.tokens and statistics.input_absmean is not None:
        statistics.input_absmean = statistics.input_absmean / statistics.tokens
    if statistics.tokens == 0 and needs:
        raise NumericalError(
            f"{target.name}: no calibration token reached this layer; calibrate on more text or --exclude it."
        )
    for gram in (statistics.input_gram, statistics.output_gram):
        if gram is not None and gram.tokens != statistics.tokens:
            raise NumericalError(
                f"{target.name}: shared its input tensor with other layers in some batches and not in others; "
                "eckart cannot tell which statistics belong to it. --exclude it."
            )
    parts = [statistics.input_absmean, torch.tensor(statistics.input_energy)]
    parts += [gram.matrix.diagonal() for gram in (statistics.input_gram, statistics.output_gram) if gram]
    if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
        raise NumericalError(
            f"{target.name}: NaN or infinity in its calibration inputs; calibrate in float32 or bfloat16, "
            "or check the model."
        )


def _loss_gradients(model: nn.Module, blocks: nn.ModuleList, stream: Stream, progress: Progress) -> list[Tensor]:
    """Gradient of each window's mean next-token loss at the output of the last block, per batch.

    The one label shift is here: position t predicts token t + 1. (Passing shifted `labels` to a model
    that shifts them itself is the published bug of predicting the token after the next.)
    """
    gradients = []
    for index in track(range(len(stream.batches)), "loss", len(stream.batches), progress):
        stream.hidden[index] = stream.hidden[index].detach().requires_grad_()
        with torch.enable_grad():
            logits = run_tail(model, blocks, stream, index).logits[:, :-1]
            labels = stream.batches[index][:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / labels.shape[1]
            (gradient,) = torch.autograd.grad(loss, stream.hidden[index])
        stream.hidden[index] = stream.hidden[index].detach()
        gradients.append(gradient)
    return gradients


def _backward_block(
    block: nn.Module,
    targets: Sequence[Target],
    entrances: Sequence[Tensor],
    calls: Sequence[Call],
    gradients: list[Tensor],
    result: dict[str, Statistics],
) -> None:
    """Recompute one block, collect gradient statistics, and move the gradients to its entrance."""
    for index, (entrance, call) in enumerate(zip(entrances, calls, strict=True)):
        entrance = entrance.detach().requires_grad_()
        with _Recorder(block, targets) as recorder, torch.enable_grad():
            output = call.run(block, entrance)
            seen = recorder.seen
            wanted = [entrance, *(y for _, _, y in seen)]
            gradients[index], *at_outputs = torch.autograd.grad(output, wanted, gradients[index])
        for (target, x, _), gradient in zip(seen, at_outputs, strict=True):
            per_window = (len(entrance), -1)  # some models flatten windows and tokens before their MLP
            _add_weight_fisher(
                result[target.name],
                x.detach().reshape(*per_window, x.shape[-1]),
                gradient.reshape(*per_window, gradient.shape[-1]),
            )
    for target in targets:
        rows = result[target.name].fisher_rows
        if rows is None or not torch.isfinite(rows).all():
            raise NumericalError(f"{target.name}: NaN or infinity in its gradients; calibrate in float32.")


def _add_weight_fisher(statistics: Statistics, x: Tensor, gradient: Tensor) -> None:
    """Add `(dloss/dW)^2`, one per window, for x `[batch, seq, in]` and gradient `[batch, seq, out]`."""
    squared = (gradient.mT.float() @ x.float()).square().sum(0, dtype=torch.float64)  # [out, in]
    rows, columns = statistics.fisher_rows, statistics.fisher_columns
    statistics.fisher_rows = squared.sum(1) if rows is None else rows + squared.sum(1)
    statistics.fisher_columns = squared.sum(0) if columns is None else columns + squared.sum(0)
