"""Two-sided: the left side of the metric is the gradient Gram, the right side the input Gram (K-FAC).

SVD-LLM with one thing more: errors are also weighed by what they do to the model's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from eckart.errors import OptionError
from eckart.factorizers._shrinkage import CANDIDATES, held_out_errors
from eckart.factorizers.base import Factorizer, GroupDecomposition, failures_named
from eckart.linalg import Decomposition, Metric, Side
from eckart.statistics.sums import GroupStatistics, Need
from eckart.types import Group

LABELS = {
    "sampled": Need.GRADIENT_GRAM,
    "mixed": Need.MIXED_GRADIENT_GRAM,
    "true": Need.TRUE_GRADIENT_GRAM,
}

INPUTS = {"plain": Need.SMALLER_GRAM, "weighed": Need.WEIGHED_GRAM}


@final
@dataclass(frozen=True)
class TwoSided(Factorizer):
    """Minimises the predicted loss `1/2 tr(G (W - Ŵ) H (W - Ŵ)^T) / N^2` over N tokens, in nats per token.

    `H = sum x x^T` and `G = sum g g^T` are the two Kronecker factors of the Fisher information (Martens and Grosse,
    arXiv 1503.05671); with `G = L L^T` the product is `L^T W R`, transposed. `labels = "sampled"` from the model's
    own predictions makes it the Fisher information, and the loss the KL divergence from the dense model; `"mixed"`
    estimates the same with less noise, by all labels at once under random signs; `"true"` is the empirical Fisher.
    `inputs = "weighed"` gives each token of H the weight that its gradient has in G (`eckart.statistics.weighed`).
    `losses = "unseen"` predicts what a rank loses from text that did not make the cut: the first three quarters of
    the calibration cut, the last one judges, and then all of it makes the factors; it costs a second decomposition. A
    shrinkage a in [0, 1) replaces a Gram K by `(1 - a) K + a mean(diag K) I`; "auto" for gradients chooses a for each
    group by held-out prediction (`eckart.factorizers._shrinkage`). What is not modelled: errors of different weights
    and of different tokens are taken to be independent.
    """

    input_shrinkage: float = 0.01
    gradient_shrinkage: float | str = 0.1
    labels: Literal["sampled", "mixed", "true"] = "sampled"
    inputs: Literal["weighed", "plain"] = "weighed"
    losses: Literal["unseen", "seen"] = "unseen"

    def __post_init__(self) -> None:
        if not 0 <= self.input_shrinkage < 1:
            raise OptionError(f"two_sided.input_shrinkage is {self.input_shrinkage:g}, but must lie in [0, 1).")
        shrinkage = self.gradient_shrinkage
        if shrinkage != "auto" and (isinstance(shrinkage, str) or not 0 <= shrinkage < 1):
            raise OptionError(f'two_sided.gradient_shrinkage is {shrinkage!r}, but must lie in [0, 1) or be "auto".')

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (INPUTS[self.inputs], LABELS[self.labels])

    def decompose(self, group: Group, weights: Sequence[Tensor], statistics: GroupStatistics) -> GroupDecomposition:
        """Decompose as every factorizer does, "auto" replaced by its choice before that."""
        if not isinstance(self.gradient_shrinkage, str):
            decomposition = super().decompose(group, weights, statistics)
            if self.losses == "unseen":
                unseen = self._unseen(group, torch.cat(list(weights)), statistics)
                decomposition.spectrum = replace(decomposition.spectrum, unseen=unseen)
            return decomposition
        losses = self._held_out_losses(group, torch.cat(list(weights)), statistics)
        chosen = min(losses, key=losses.__getitem__) if losses else CANDIDATES[0]
        decomposition = replace(self, gradient_shrinkage=chosen).decompose(group, weights, statistics)
        decomposition.details["gradient_shrinkage"] = chosen
        if losses:
            decomposition.details["held_out_loss"] = {f"{a:g}": float(f"{loss:.6g}") for a, loss in losses.items()}
        else:
            need = "gradient_shrinkage=auto needs two batches of calibration text or more"
            decomposition.note = f"{need}; taking {chosen:g}"
        return decomposition

    def _unseen(self, group: Group, weight: Tensor, statistics: GroupStatistics) -> Tensor | None:
        """Squared errors on the last quarter of the cuts that the first three make, `[full rank + 1]`, on the CPU.

        In the unit of the whole text's own (`nats`), and never rising with the rank. None if no quarter is known.
        """
        parts = statistics.early_and_late
        if parts is None:
            return None
        early, late = parts
        judge = replace(self, input_shrinkage=0.0, gradient_shrinkage=0.0)
        with failures_named(group):
            tails = Decomposition(weight, self.metric(weight, early)).tails_in(judge.metric(weight, late))
        tails = tails.cpu().clamp(min=0).flip(0).cummax(0).values.flip(0)
        return tails * (judge.nats(late) / self.nats(statistics))

    def _held_out_losses(self, group: Group, weight: Tensor, statistics: GroupStatistics) -> dict[float, float]:
        """What each candidate's cuts lose on the last quarter, in nats per token; nothing if no quarter is known."""
        parts = statistics.early_and_late
        if parts is None:
            return {}
        early, late = parts
        plain = replace(self, input_shrinkage=0.0, gradient_shrinkage=0.0)
        candidates = {a: replace(self, gradient_shrinkage=a) for a in CANDIDATES}
        with failures_named(group):
            metrics = ((a, candidate.metric(weight, early)) for a, candidate in candidates.items())
            errors = held_out_errors(group, weight, metrics, plain.metric(weight, late))
        return {a: plain.nats(late) * error for a, error in errors.items()}

    def metric(self, weight: Tensor, statistics: GroupStatistics) -> Metric:
        """The metric for a shrinkage that is a number; `decompose` puts one in place of "auto"."""
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

    def judged_by_its_own_text(self) -> "TwoSided":
        return replace(self, losses="seen")

    def sides(self, statistics: GroupStatistics, details: Mapping[str, Any]) -> tuple[Side, Side]:
        grams = [member.gradient_gram.matrix for member in statistics.members if member.gradient_gram is not None]
        stacked: Tensor = grams[0] if len(grams) == 1 else torch.block_diag(*grams)  # type: ignore[no-untyped-call]
        chosen = details.get("gradient_shrinkage", self.gradient_shrinkage)
        right = statistics.input_side(_as_damping(self.input_shrinkage))
        assert right is not None
        return Side(gram=stacked, damping=_as_damping(chosen)), right

    def nats(self, statistics: GroupStatistics) -> float:
        """Half of the shrinkages' `1 - a` over tokens, predictions and, for the mean input, members."""
        first = statistics.members[0]
        shrunk = (1 - self.input_shrinkage) * (1 - _number(self.gradient_shrinkage))
        return shrunk / (2 * first.tokens * first.predictions * len(statistics.members))


def _as_damping(shrinkage: float | str) -> float:
    """`(1 - a) K + a c I = (1 - a) (K + a / (1 - a) c I)`; the factor `1 - a` is put into `nats`."""
    return _number(shrinkage) / (1 - _number(shrinkage))


def _number(shrinkage: float | str) -> float:
    if isinstance(shrinkage, str):
        raise ValueError(f"a shrinkage of {shrinkage!r} has no metric yet; decompose chooses a number for it")
    return shrinkage


def _energy(energy: float) -> float:
    return energy if energy > 0 else 1.0
