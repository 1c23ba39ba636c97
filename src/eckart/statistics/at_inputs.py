"""What is collected at the inputs of a block's linear layers, as the block runs."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.model.operators import operator
from eckart.statistics.sums import Gram, Need, Statistics
from eckart.types import Target


def collect_input(
    x: Tensor,
    members: Sequence[tuple[Target, Tensor]],
    block: nn.Module,
    result: dict[str, Statistics],
    needs: frozenset[Need],
    whole_gram: Collection[str] = (),
) -> None:
    """Add one input tensor `[batch, seq, in]` to the statistics of the linears that read it; without needs, count."""
    x = x.reshape(-1, x.shape[-1])
    if not needs:
        for target, _ in members:
            result[target.name].tokens += x.shape[0]
        return
    leader = result[members[0][0].name]
    if leader.tokens == 0:
        _choose_grams(members, result, needs, whole_gram, x.device)
    grams = {id(g): g for g in (result[t.name].input_gram for t, _ in members) if g is not None}
    for gram in grams.values():
        gram.add_(x)
    energy = float(x.float().square().sum(dtype=torch.float64)) / x.shape[-1]
    absolute = x.abs().sum(0, dtype=torch.float64) if Need.INPUT_ABSMEAN in needs else None
    for target, y in members:
        statistics = result[target.name]
        statistics.tokens += x.shape[0]
        statistics.input_energy += energy
        if absolute is not None:
            before = statistics.input_absmean
            statistics.input_absmean = absolute if before is None else before + absolute
        if statistics.output_gram is not None:
            bias = operator(block, target.place).bias
            statistics.output_gram.add_(y if bias is None else y - bias)


def _choose_grams(
    members: Sequence[tuple[Target, Tensor]],
    result: dict[str, Statistics],
    needs: frozenset[Need],
    whole_gram: Collection[str],
    device: torch.device,
) -> None:
    """Give the linears that share an input one input Gram, or an output Gram each if that is smaller.

    Only a wide or square matrix with a basis of its own can do with its output Gram (identities 1
    and 2: with out <= in the eigenproblem of `W H W^T` is the smaller one).
    """
    if not needs & {Need.INPUT_GRAM, Need.SMALLER_GRAM}:
        return
    targets = [target for target, _ in members]
    width = targets[0].in_features
    tall = any(t.out_features > t.in_features for t in targets)
    cheaper = sum(t.out_features**2 for t in targets) < width**2
    whole = Need.INPUT_GRAM in needs or any(t.name in whole_gram for t in targets)
    if not whole and not tall and cheaper:
        for target in targets:
            result[target.name].output_gram = Gram(target.out_features, device)
        return
    shared = Gram(width, device)
    for target in targets:
        result[target.name].input_gram = shared


def finish_inputs(target: Target, statistics: Statistics, needs: frozenset[Need]) -> None:
    """Turn sums into means where the statistic is a mean, and check that everything is finite.

    A target that no token reached has no sums: `tokens` is 0, and it cannot be decomposed.
    """
    if statistics.tokens and statistics.input_absmean is not None:
        statistics.input_absmean = statistics.input_absmean / statistics.tokens
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
