"""What is collected from the loss gradients at the outputs of a block's linear layers.

One backward run through one recomputed block at a time. Gradients of weights are never formed: only
those of activations, of which a matrix keeps the Gram on its smaller side.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.model.calls import Call
from eckart.model.recorder import Recorder
from eckart.model.residence import Residence
from eckart.model.store import Store
from eckart.model.walk import Stream, tail_of
from eckart.progress import Progress, track
from eckart.statistics.at_inputs import collect_input, finish_inputs
from eckart.statistics.sums import (
    GRADIENT_GRAM_NEEDS,
    GRADIENT_NEEDS,
    TRUE_LABEL_NEEDS,
    Gram,
    Need,
    Statistics,
    mark_three_quarters,
)
from eckart.support.memory import give_back
from eckart.types import Target


@dataclass(frozen=True)
class Backward:
    """Where a backward run is, batch by batch: what enters `block`, how it is called, the loss gradients.

    `gradients[i]` `[batch, seq, width]` is at the block's output; `backward_block` moves it to the entrance.
    """

    index: int
    block: nn.Module
    entrances: Store
    calls: list[Call]
    gradients: list[Tensor]


def check_labels(needs: frozenset[Need]) -> None:
    """Raise `ValueError` for needs that want different labels: each kind takes a backward run of its own."""
    labels = needs & GRADIENT_NEEDS
    if not labels <= TRUE_LABEL_NEEDS and len(labels) > 1:
        raise ValueError(f"{', '.join(sorted(labels))}: their labels cannot both be in one sweep; sweep twice.")


def loss_gradients(
    model: nn.Module, residence: Residence, stream: Stream, needs: frozenset[Need], seed: int, progress: Progress
) -> list[Tensor]:
    """Gradient of the summed next-token loss at the output of the last block, `[batch, seq, width]` per batch.

    The one label shift is here: position t predicts token t + 1. (Passing shifted `labels` to a model
    that shifts them itself is the published bug of predicting the token after the next.) One window at a time:
    logits are the largest tensors of a run, and several of their size live at once.
    """
    gradients, first = [], 0
    for batch in track(range(len(stream.batches)), "loss", len(stream.batches), progress):
        parts = []
        for ids, state in zip(torch.split(stream.batches[batch], 1), torch.split(stream.states[batch], 1), strict=True):
            state = state.detach().requires_grad_()
            with torch.enable_grad():
                logits = tail_of(model, residence, ids, state, stream.returned).logits[:, :-1]
            at_logits = _at_logits(torch.softmax(logits.detach().float(), -1), ids, first, needs, seed)
            (gradient,) = torch.autograd.grad(logits, state, at_logits.to(logits.dtype))
            parts.append(gradient)
            first += 1
        gradients.append(torch.cat(parts))
        give_back()
    return gradients


def _at_logits(probabilities: Tensor, ids: Tensor, first: int, needs: frozenset[Need], seed: int) -> Tensor:
    """The loss gradient at the logits, `[batch, seq - 1, vocabulary]`, in the memory of `probabilities`.

    True labels give `p - e_y`, sampled labels the same with y drawn from p, mixed labels a vector of
    the same mean square `diag(p) - p p^T` (the Fisher information at the logits) and less noise.
    Window by window, with a generator for each: neither batches nor devices change what is drawn.
    """
    for number, (rows, tokens) in enumerate(zip(probabilities, ids, strict=True), first):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        if Need.MIXED_GRADIENT_GRAM in needs:
            rows.copy_(mix(rows, torch.empty(rows.shape).bernoulli_(0.5, generator=generator).to(rows) * 2 - 1))
            continue
        labels = tokens[1:]
        if Need.GRADIENT_GRAM in needs:
            labels = sample(rows, torch.rand(len(rows), generator=generator, dtype=torch.float64).to(rows.device))
        rows[torch.arange(len(rows), device=rows.device), labels] -= 1
    return probabilities


def mix(probabilities: Tensor, signs: Tensor) -> Tensor:
    """`sqrt(p) s - p (sqrt(p) . s)` for random signs s, `[..., vocabulary]`: its mean square is `diag(p) - p p^T`.

    Where one label is nearly certain, a sampled one is nearly always without gradient and seldom has a
    large one; this has about the same length every time.
    """
    signed = probabilities.sqrt() * signs
    return signed - probabilities * signed.sum(-1, keepdim=True)


def sample(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The label at each draw in [0, 1) `[seq]` of the distribution `[seq, vocabulary]`: the inverse of its sums."""
    sums = probabilities.cumsum(-1)
    labels = torch.searchsorted(sums, draws[:, None].to(sums.dtype) * sums[:, -1:], right=True)
    return labels[:, 0].clamp(max=probabilities.shape[-1] - 1)


def backward_block(
    block: nn.Module,
    targets: Sequence[Target],
    at: Backward,
    needs: frozenset[Need],
    whole_gram: Collection[str] = (),
    whole_gradients: bool = False,
) -> dict[str, Statistics]:
    """Recompute one block, collect its statistics, and move the gradients to its entrance, in place.

    `whole_gradients` gives tall matrices their gradient Gram at the output, too, in place of the smaller one.
    """
    result = {target.name: Statistics() for target in targets}
    gradients, pulls = at.gradients, needs & GRADIENT_GRAM_NEEDS and not whole_gradients
    for index, (entrance, call) in enumerate(zip(at.entrances, at.calls, strict=True)):
        entrance = entrance.detach().requires_grad_()
        with Recorder(block, targets, own_inputs=True) as recorder, torch.enable_grad():
            output = call.run(block, entrance)
            # What only chooses, such as an indexer of sparse attention, runs apart from the gradient or ends there.
            uses = [(target, x, y) for target, x, y in recorder.uses if y.requires_grad]
            tall = [x for target, x, _ in uses if pulls and _is_tall(target)]
            tensors = [entrance, *(y for _, _, y in uses), *tall]
            found: Sequence[Tensor | None] = torch.autograd.grad(output, tensors, gradients[index], allow_unused=True)
        at_entrance, inner_gradients = found[0], found[1:]
        assert at_entrance is not None
        gradients[index] = at_entrance
        for target, _, y in recorder.uses:
            result[target.name].without_gradient |= not y.requires_grad
        at_inputs = iter(inner_gradients[len(uses) :])
        for (target, x, _), gradient in zip(uses, inner_gradients[: len(uses)], strict=True):
            statistics, windows = result[target.name], len(entrance)
            pulled = next(at_inputs) if pulls and _is_tall(target) else None
            if gradient is None:
                statistics.without_gradient = True
                continue
            if needs & GRADIENT_GRAM_NEEDS:
                _add_gradient(statistics, target, gradient, pulled)
                statistics.predictions += windows * (entrance.shape[1] - 1)
            if Need.WEIGHT_FISHER in needs:
                _add_weight_fisher(statistics, _per_window(x.detach(), windows), _per_window(gradient, windows))
        for x, members in recorder.by_input():
            outputs = [(t, y.detach()) for t, y in members]
            collect_input(x.detach(), outputs, block, result, needs - GRADIENT_NEEDS, whole_gram)
        mark_three_quarters(result.values(), index + 1, len(at.entrances))
    for target in targets:
        finish_inputs(target, result[target.name], needs - GRADIENT_NEEDS)
        _check(target, result[target.name])
    return result


def _is_tall(target: Target) -> bool:
    return target.out_features > target.in_features


def _per_window(tensor: Tensor, windows: int) -> Tensor:
    """`[windows, seq, k]`, also for models that flatten windows and tokens before their MLP."""
    return tensor.reshape(windows, -1, tensor.shape[-1])


def _add_gradient(statistics: Statistics, target: Target, gradient: Tensor, pulled: Tensor | None) -> None:
    """Add gradients at the output, `[..., out]`; for a tall matrix those at its input, `[..., in]`, make the Gram."""
    energy = gradient.float().square().sum(dtype=torch.float64)
    statistics.gradient_energy += float(energy) / target.out_features
    if pulled is not None:
        if statistics.pulled_gradient_gram is None:
            statistics.pulled_gradient_gram = Gram(target.in_features, gradient.device)
        statistics.pulled_gradient_gram.add_(pulled)
        return
    if statistics.gradient_gram is None:
        statistics.gradient_gram = Gram(target.out_features, gradient.device)
    statistics.gradient_gram.add_(gradient)


def _add_weight_fisher(statistics: Statistics, x: Tensor, gradient: Tensor) -> None:
    """Add `(dloss/dW)^2` of each window's mean loss, for x `[batch, seq, in]` and gradient `[batch, seq, out]`."""
    of_mean = gradient.mT.float() @ x.float() / (x.shape[1] - 1)
    squared = of_mean.square().sum(0, dtype=torch.float64)  # [out, in]
    rows, columns = statistics.fisher_rows, statistics.fisher_columns
    statistics.fisher_rows = squared.sum(1) if rows is None else rows + squared.sum(1)
    statistics.fisher_columns = squared.sum(0) if columns is None else columns + squared.sum(0)


def _check(target: Target, statistics: Statistics) -> None:
    grams = [g.matrix.diagonal() for g in (statistics.gradient_gram, statistics.pulled_gradient_gram) if g is not None]
    parts = [torch.tensor(statistics.gradient_energy), *grams]
    parts += [part for part in (statistics.fisher_rows,) if part is not None]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise NumericalError(f"{target.name}: NaN or infinity in its gradients; calibrate in float32.")
