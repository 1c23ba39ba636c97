"""Statistics of experts: what the tokens that were routed to one say, mended by what all tokens of its layer say.

An expert sees a share of the tokens, a rare one few. Its second moments are taken as if it had seen some average
tokens of its layer beside its own n: a Gram H over n tokens becomes `n / (n + k) (H + k M)`, where M is the mean of a
routed token in the layer and k the prior number of tokens. What experts share is the space of the states: M there is
the layer's own second-moment matrix. The space between the two matrices of an expert is its own, of which other
experts say no more than how large things are: M is a multiple of the identity. An expert that no token reached has the
layer's M alone, as if it had seen one token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.model.experts import OpenStack
from eckart.statistics.sums import GRADIENT_GRAM_NEEDS, GRADIENT_NEEDS, Gram, Need, Statistics
from eckart.types import Target


def weighs_by_gates(needs: frozenset[Need]) -> bool:
    """Whether an expert's tokens weigh by their squared gates: where gradients are asked for, they hold the gate."""
    return not needs & GRADIENT_NEEDS


def readers(block: nn.Module, targets: Iterable[Target]) -> set[str]:
    """The names of the experts that read the states. They have input Grams, of which the layer's is the sum."""
    kinds = {t.kind for t in targets if t.expert is not None}
    reading = {kind for kind in kinds if _stack(block, kind).reads_states}
    return {t.name for t in targets if t.kind in reading}


def settle_(
    block: nn.Module, targets: Sequence[Target], result: dict[str, Statistics], needs: frozenset[Need], prior: float
) -> None:
    """Mend the statistics of a block's experts, in place. A layer that no token reached stays unknown."""
    for kind in dict.fromkeys(t.kind for t in targets if t.expert is not None):
        members = [t for t in targets if t.kind == kind]
        collected = [result[t.name] for t in members]
        for statistics in collected:
            statistics.routed = statistics.tokens
        if any(s.tokens for s in collected):
            layer = _Layer.of(collected, _stack(block, kind).reads_states)
            for target, statistics in zip(members, collected, strict=True):
                weight: Tensor = _stack(block, kind).get_submodule(str(target.expert)).weight  # type: ignore[assignment]
                _mend(statistics, layer, weight.detach(), needs, prior)


def _stack(block: nn.Module, kind: str) -> OpenStack:
    stack = block.get_submodule(kind)
    assert isinstance(stack, OpenStack)
    return stack


@dataclass(frozen=True)
class _Layer:
    """Means over all routed tokens of a layer, on the two sides of the matrices of one stack.

    `inputs` `[in, in]` and `gradients` `[out, out]` are second moments, a multiple of the identity on the side that
    the experts do not share, and there a number; the energies are the means of their diagonals.
    """

    inputs: Tensor | float
    input_energy: float
    absmean: Tensor | None
    gradients: Tensor | float
    gradient_energy: float
    fisher_rows: Tensor | None
    fisher_columns: Tensor | None

    @staticmethod
    def of(collected: Sequence[Statistics], reads_states: bool) -> "_Layer":
        reached = [s for s in collected if s.tokens]
        tokens = sum(s.tokens for s in reached)
        input_energy = sum(s.input_energy for s in reached) / tokens
        gradient_energy = sum(s.gradient_energy for s in reached) / tokens
        inputs = _mean([s.input_gram for s in reached], tokens) if reads_states else None
        gradients = None if reads_states else _mean([s.gradient_gram for s in reached], tokens)
        absmeans = [s.input_absmean * s.tokens for s in reached if s.input_absmean is not None]
        rows = [s.fisher_rows for s in reached if s.fisher_rows is not None]
        columns = [s.fisher_columns for s in reached if s.fisher_columns is not None]
        return _Layer(
            input_energy if inputs is None else inputs,
            input_energy,
            _sum(absmeans, tokens, reads_states),
            gradient_energy if gradients is None else gradients,
            gradient_energy,
            _sum(rows, tokens, not reads_states),
            _sum(columns, tokens, reads_states),
        )


def _mean(grams: Sequence[Gram | None], tokens: int) -> Tensor | None:
    """The summed Grams over the number of tokens; None unless every expert has one."""
    known = [gram.matrix for gram in grams if gram is not None]
    return torch.stack(known).sum(0) / tokens if len(known) == len(grams) else None


def _sum(values: Sequence[Tensor], tokens: int, is_shared: bool) -> Tensor | None:
    """The mean of a vector over tokens, or of its entries too where experts do not share them."""
    if not values:
        return None
    mean = torch.stack(list(values)).sum(0) / tokens
    return mean if is_shared else torch.full_like(mean, float(mean.mean()))


def _mend(s: Statistics, layer: _Layer, weight: Tensor, needs: frozenset[Need], prior: float) -> None:
    if s.early is not None and not 0 < s.early.tokens < s.tokens:
        s.early = None  # all of its tokens came before the mark, or after it: nothing can be held out
        for gram in s.grams:
            gram.early = None
    if not s.tokens:
        _take(s, layer, weight, needs)
        return
    out_features, in_features = weight.shape
    n, wide = s.tokens, weight.double()
    if s.input_gram is not None:
        _shrink(s.input_gram, layer.inputs, prior * in_features)
    if s.output_gram is not None:
        _shrink(s.output_gram, _pushed(wide, layer.inputs), prior * in_features)
    if s.gradient_gram is not None:
        _shrink(s.gradient_gram, layer.gradients, prior * out_features)
    if s.pulled_gradient_gram is not None:
        _shrink(s.pulled_gradient_gram, _pushed(wide.T, layer.gradients), prior * out_features)
    for part in (s, s.early):
        if part is not None:
            part.input_energy = _shrunk(part.input_energy, part.tokens, layer.input_energy, prior * in_features, n)
            energy = _shrunk(part.gradient_energy, part.tokens, layer.gradient_energy, prior * out_features, n)
            part.gradient_energy = energy
    if s.input_absmean is not None and layer.absmean is not None:
        k = prior * in_features
        s.input_absmean = (n * s.input_absmean + k * layer.absmean) / (n + k)


def _take(s: Statistics, layer: _Layer, weight: Tensor, needs: frozenset[Need]) -> None:
    """The layer's means, as of one token."""
    out_features, in_features = weight.shape
    s.tokens, s.input_energy, s.gradient_energy = 1, layer.input_energy, layer.gradient_energy
    s.input_absmean, s.fisher_rows, s.fisher_columns = layer.absmean, layer.fisher_rows, layer.fisher_columns
    if needs & {Need.INPUT_GRAM, Need.SMALLER_GRAM, Need.WEIGHED_GRAM}:
        s.input_gram = _gram(layer.inputs, in_features, weight.device)
    if needs & GRADIENT_GRAM_NEEDS and out_features > in_features:
        s.pulled_gradient_gram = _gram(_pushed(weight.double().T, layer.gradients), in_features, weight.device)
    elif needs & GRADIENT_GRAM_NEEDS:
        s.gradient_gram = _gram(layer.gradients, out_features, weight.device)


def _gram(mean: Tensor | float, size: int, device: torch.device) -> Gram:
    gram = Gram(size, device)
    gram.matrix, gram.tokens = _as_matrix(mean, gram.matrix).clone(), 1
    return gram


def _shrink(gram: Gram, mean: Tensor | float, k: float) -> None:
    """`n / (n + k) (H + k M)` in place; what was there at the mark has its share of it."""
    n = gram.tokens
    for part in (gram, gram.early):
        if part is not None:
            part.matrix = n / (n + k) * (part.matrix + k * part.tokens / n * _as_matrix(mean, part.matrix))


def _shrunk(energy: float, tokens: int, mean: float, k: float, n: int) -> float:
    return n / (n + k) * (energy + k * tokens / n * mean)


def _pushed(weight: Tensor, mean: Tensor | float) -> Tensor:
    """`W M W^T`."""
    return mean * (weight @ weight.T) if isinstance(mean, float) else weight @ mean @ weight.T


def _as_matrix(mean: Tensor | float, like: Tensor) -> Tensor:
    return mean * torch.eye(len(like), dtype=like.dtype, device=like.device) if isinstance(mean, float) else mean
