"""Two-sided: the left side of the metric is the gradient Gram, the right side the input Gram (K-FAC).

SVD-LLM with one thing more: errors are also weighed by what they do to the model's loss.
"""

from dataclasses import dataclass, replace
from typing import Literal, final

import torch

from eckart.errors import OptionError
from eckart.factorizers.base import Factorizer
from eckart.linalg import Metric, Side
from eckart.statistics import GroupStatistics, Need

Tensor = torch.Tensor

LABELS = {
    "sampled": Need.GRADIENT_GRAM,
    "mixed": Need.MIXED_GRADIENT_GRAM,
    "true": Need.TRUE_GRADIENT_GRAM,
}


@final
@dataclass(frozen=True)
class TwoSided(Factorizer):
    """Minimises the predicted loss `1/2 tr(G (W - Ŵ) H (W - Ŵ)^T) / N^2` over N tokens, in nats per token.

    `H = sum x x^T` and `G = sum g g^T` are the two Kronecker factors of the Fisher information
    (Martens and Grosse, arXiv 1503.05671); with `G = L L^T` the product is `L^T W R`, transposed.
    `labels = "sampled"` from the model's own predictions makes it the Fisher information, and the
    loss the KL divergence from the dense model; `"mixed"` estimates the same with less noise, by all
    labels at once under random signs; `"true"` is the empirical Fisher. A shrinkage a in
    [0, 1) replaces a Gram K by `(1 - a) K + a mean(diag K) I`. What is not modelled: errors of
    different weights and of different tokens are taken to be independent.
    """

    input_shrinkage: float = 1e-4
    gradient_shrinkage: float = 0.1
    labels: Literal["sampled", "mixed", "true"] = "sampled"

    def __post_init__(self) -> None:
        for name in ("input_shrinkage", "gradient_shrinkage"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"two_sided.{name} is {getattr(self, name):g}, but must lie in [0, 1).")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (Need.SMALLER_GRAM, LABELS[self.labels])

    def metric(self, weight: Tensor, statistics: GroupStatistics) -> Metric:
        metric = statistics.input_metric(weight, _as_damping(self.input_shrinkage))
        damping, members = _as_damping(self.gradient_shrinkage), statistics.members
        if weight.shape[0] > weight.shape[1] and metric.right is not None:
            # The right form knows G through the weight alone: W^T G W.
            weights = weight.double().chunk(len(members))  # members of a group are of one kind and one shape
            inner = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
            for member, own in zip(members, weights, strict=True):
                if member.pulled_gradient_gram is not None:
                    inner += member.pulled_gradient_gram.matrix
                else:
                    assert member.gradient_gram is not None
                    inner += own.T @ member.gradient_gram.matrix @ own
                inner += damping * _energy(member.gradient_energy) * (own.T @ own)
            return replace(metric, left=None, inner=inner)
        grams = [member.gradient_gram.matrix for member in members if member.gradient_gram is not None]
        stacked: Tensor = grams[0] if len(grams) == 1 else torch.block_diag(*grams)  # type: ignore[no-untyped-call]
        return replace(metric, left=Side(gram=stacked, damping=damping))

    def nats(self, statistics: GroupStatistics) -> float:
        """Half of the shrinkages' `1 - a` over tokens, predictions and, for the mean input, members."""
        first = statistics.members[0]
        shrunk = (1 - self.input_shrinkage) * (1 - self.gradient_shrinkage)
        return shrunk / (2 * first.tokens * first.predictions * len(statistics.members))


def _as_damping(shrinkage: float) -> float:
    """`(1 - a) K + a c I = (1 - a) (K + a / (1 - a) c I)`; the factor `1 - a` is put into `nats`."""
    return shrinkage / (1 - shrinkage)


def _energy(energy: float) -> float:
    return energy if energy > 0 else 1.0
