"""What is collected from the loss gradients at the outputs of a block's linear layers.

One backward run through one recomputed block at a time. Gradients of weights are never formed: only
those of activations, of which a matrix keeps the Gram on its smaller side.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.model.experts import PRIOR, Routed
from eckart.model.residence import Residence
from eckart.model.walk import Stream, tail_of
from eckart.progress import Progress, track
from eckart.statistics.at_inputs import collect_input, finish_inputs
from eckart.statistics.recomputed import Backward, Use, recompute
from eckart.statistics.routed import readers, settle_, weighs_by_gates
from eckart.statistics.sums import (
    GRADIENT_GRAM_NEEDS,
    GRADIENT_NEEDS,
    TRUE_LABEL_NEEDS,
    Gram,
    Need,
    Statistics,
    mark_three_quarters,
)
from eckart.statistics.weighed import TokenWeights, add_weighed
from eckart.support.memory import give_back
from eckart.types import Target


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
    prior: float = PRIOR,
) -> dict[str, Statistics]:
    """Recompute one block, collect its statistics, and move the gradients to its entrance, in place.

    `whole_gradients` gives tall matrices their gradient Gram at the output, too, in place of the smaller one.
    """
    result = {target.name: Statistics() for target in targets}
    at_inputs = needs - GRADIENT_NEEDS - {Need.WEIGHED_GRAM}
    of_experts = at_inputs | ({Need.SMALLER_GRAM} if Need.WEIGHED_GRAM in needs else set())  # few tokens: plainly
    whole_gram = {*whole_gram, *readers(block, targets)}
    plain = [target for target in targets if target.expert is None]
    weights = TokenWeights.of(block, plain, at) if Need.WEIGHED_GRAM in needs else None
    pulls = bool(needs & GRADIENT_GRAM_NEEDS) and not whole_gradients
    for index in range(len(at.calls)):
        here = recompute(block, targets, at, index, at_tall_inputs=pulls, gated=weighs_by_gates(needs))
        windows, length = at.gradients[index].shape[:2]
        reached = set[str]()
        for use in here.uses:
            statistics = result[use.target.name]
            if use.gradient is None:
                statistics.without_gradient = True
                continue
            reached.add(use.target.name)
            _add(statistics, use, windows, length, needs)
            if weights is not None and use.target.expert is None:
                weight = weights(use.target, use.gradient)
                add_weighed(statistics, use, block, weight, use.target.name in whole_gram)
        for target in targets if needs & GRADIENT_GRAM_NEEDS else ():
            # However often a target runs; an expert's loss is spread over all predictions, reached by a token or not.
            if target.name in reached or target.expert is not None:
                result[target.name].predictions += windows * (length - 1)
        for x, members in here.by_input:
            wanted = at_inputs if members[0][0].expert is None else of_experts
            collect_input(x, members, block, result, wanted, whole_gram)
        at.gradients[index], at.at_carried[index] = here.at_entrance, here.at_carried
        mark_three_quarters(result.values(), index + 1, len(at.calls))
    for target in targets:
        finish_inputs(target, result[target.name], needs - GRADIENT_NEEDS)
        _check(target, result[target.name])
    settle_(block, targets, result, needs, prior)
    return result


def _add(statistics: Statistics, use: Use, windows: int, length: int, needs: frozenset[Need]) -> None:
    """Add what is collected from the gradients of one use in a run of so many windows of this length."""
    assert use.gradient is not None
    if needs & GRADIENT_GRAM_NEEDS:
        _add_gradient(statistics, use.target, use.gradient, use.at_input)
    if Need.WEIGHT_FISHER in needs:
        for x, gradient in _by_window(use.x, use.gradient, windows, length, use.routed):
            _add_weight_fisher(statistics, x, gradient, length - 1)


def _by_window(
    x: Tensor, gradient: Tensor, windows: int, length: int, routed: Routed | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and gradients `[windows, seq, k]`, or window by window those of the tokens that reached an expert."""
    if routed is None:
        yield _per_window(x, windows), _per_window(gradient, windows)
        return
    for window in range(windows):
        rows = routed.tokens // length == window
        yield x[rows][None], gradient[rows][None]


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


def _add_weight_fisher(statistics: Statistics, x: Tensor, gradient: Tensor, predictions: int) -> None:
    """Add `(dloss/dW)^2` of each window's mean loss, for x `[batch, seq, in]` and gradient `[batch, seq, out]`."""
    of_mean = gradient.mT.float() @ x.float() / predictions
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
