"""What the sweep can collect about a target, and the sums that hold it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

import torch
from torch import Tensor

from eckart.linalg import DAMPING, Metric, Side


class Need(StrEnum):
    """A statistic that a factorizer or refiner may declare; the sweep collects the union, no more."""

    SMALLER_GRAM = "smaller_gram"  # the input Gram, or the output Gram where that is smaller
    INPUT_GRAM = "input_gram"  # sum of x x^T over tokens, [in, in]
    WEIGHED_GRAM = "weighed_gram"  # as smaller_gram, each token weighed by its gradients (`statistics.weighed`)
    INPUT_ABSMEAN = "input_absmean"  # mean of |x| over tokens, [in]
    WEIGHT_FISHER = "weight_fisher"  # squared loss gradients of the weight, summed per input and per output
    GRADIENT_GRAM = "gradient_gram"  # sum of g g^T, g = dloss/doutput, or its pull-back through the weight; smaller
    MIXED_GRADIENT_GRAM = "mixed_gradient_gram"  # the same mean with less noise: all labels at once, random signs
    TRUE_GRADIENT_GRAM = "true_gradient_gram"  # the same with the text's own labels instead of sampled ones


GRADIENT_GRAM_NEEDS = frozenset({Need.GRADIENT_GRAM, Need.MIXED_GRADIENT_GRAM, Need.TRUE_GRADIENT_GRAM})
GRADIENT_NEEDS = GRADIENT_GRAM_NEEDS | {Need.WEIGHT_FISHER}
TRUE_LABEL_NEEDS = frozenset({Need.WEIGHT_FISHER, Need.TRUE_GRADIENT_GRAM})

STRIPS = 4  # of columns, in a Gram's product


class Gram:
    """`sum x x^T` over tokens, uncentred, `[k, k]`: products in float32, sums in float64.

    One chunk of at most a few thousand tokens is one matrix product; the chunks are added in
    float64, so that half a million tokens lose no digit (see `tests/test_statistics.py`).
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.tokens = 0
        self._sides: dict[float, Side] = {}
        self._totals: dict[tuple[Gram, ...], Gram] = {}
        self.early: Gram | None = None

    def mark(self) -> None:
        """Remember the sum so far as `early`. Once only: targets with one input share their Gram."""
        if self.early is None or self.early.tokens != self.tokens:
            self.early = Gram(len(self.matrix), self.matrix.device)
            self.early.matrix, self.early.tokens = self.matrix.clone(), self.tokens

    @property
    def late(self) -> "Gram | None":
        """The sum of what came since the mark; None without a mark."""
        if self.early is None:
            return None
        rest = Gram(len(self.matrix), self.matrix.device)
        rest.matrix, rest.tokens = self.matrix - self.early.matrix, self.tokens - self.early.tokens
        return rest

    @property
    def drift(self) -> float | None:
        """By how much the mean `x x^T` moved since the mark, relative, in the Frobenius norm; None without a mark."""
        if self.early is None or not self.early.tokens or not bool(self.matrix.any()):
            return None
        mean, early = self.matrix / self.tokens, self.early.matrix / self.early.tokens
        return float((mean - early).norm() / mean.norm())

    def add_(self, x: Tensor) -> None:
        """Add the tokens of `x`, `[..., k]`."""
        x = x.reshape(-1, x.shape[-1])
        x = x if x.dtype == torch.float64 else x.float()
        edges = [len(self.matrix) * i // STRIPS for i in range(STRIPS + 1)]
        for start, stop in pairwise(edges):  # right of the diagonal; what is below mirrors it, for 5/8 of the work
            product = x[:, start:stop].T @ x[:, start:]
            self.matrix[start:stop, start:] += product
            self.matrix[stop:, start:stop] += product[:, stop - start :].T
        self.tokens += x.shape[0]

    def side(self, damping: float = DAMPING) -> Side:
        """This Gram as a side of a metric. Made once, so that layers with one input share its root."""
        if damping not in self._sides:
            self._sides[damping] = Side(gram=self.matrix, damping=damping)
        return self._sides[damping]

    def plus(self, others: "tuple[Gram, ...]") -> "Gram":
        """The sum with other Grams. Made once, so that q, k and v of one group share its root, too."""
        if others and others not in self._totals:
            total = Gram(len(self.matrix), self.matrix.device)
            total.matrix = torch.stack([gram.matrix for gram in (self, *others)]).sum(0)
            total.tokens = self.tokens + sum(gram.tokens for gram in others)
            self._totals[others] = total
        return self._totals[others] if others else self


@dataclass
class Statistics:
    """What was collected for one target; fields that nobody asked for are `None`.

    `output_gram` is of `W x` without the bias. `input_energy` is `sum |x|^2 / in`, the mean of the
    diagonal of the input Gram, which damping needs when the input Gram itself was not collected.
    `fisher_rows` `[out]` and `fisher_columns` `[in]` are sums of `(dloss/dW_ij)^2` over windows and
    over the other index (empirical Fisher information: the labels are the text's own tokens).

    With g the gradient of the summed next-token loss at the layer's output, one for each token,
    `gradient_gram` is `G = sum g g^T` `[out, out]`. A tall matrix has `pulled_gradient_gram`
    `W^T G W` `[in, in]` instead, the Gram of the layer's own input gradients. `gradient_energy` is
    `sum |g|^2 / out`, and `predictions` counts the tokens that were predicted.

    `early` is what the Grams, energies and counts were at the mark; None without one. `without_gradient` says that no
    gradient reached the layer's output: it chooses (tokens to attend to, say), and what it does to the loss is unknown.
    `routed` is how many tokens were routed to an expert, None for what every token reaches; `tokens` is that too, or 1
    for an expert that has the means of its layer instead (`eckart.statistics.routed`).
    """

    tokens: int = 0
    input_gram: Gram | None = None
    output_gram: Gram | None = None
    input_energy: float = 0.0
    input_absmean: Tensor | None = None
    fisher_rows: Tensor | None = None
    fisher_columns: Tensor | None = None
    gradient_gram: Gram | None = None
    pulled_gradient_gram: Gram | None = None
    gradient_energy: float = 0.0
    predictions: int = 0
    early: "Statistics | None" = None
    without_gradient: bool = False
    routed: int | None = None

    @property
    def unknown(self) -> str | None:
        """Why nothing is known of the layer, in words; None if something is."""
        if self.tokens == 0:
            return "no token of the calibration reached it"
        return "no gradient of the loss reaches it" if self.without_gradient else None

    def mark(self) -> None:
        """Remember the Grams, energies and counts so far as `early`."""
        for gram in self.grams:
            gram.mark()
        self.early = Statistics(
            tokens=self.tokens,
            input_gram=self.input_gram and self.input_gram.early,
            output_gram=self.output_gram and self.output_gram.early,
            input_energy=self.input_energy,
            gradient_gram=self.gradient_gram and self.gradient_gram.early,
            pulled_gradient_gram=self.pulled_gradient_gram and self.pulled_gradient_gram.early,
            gradient_energy=self.gradient_energy,
            predictions=self.predictions,
        )

    @property
    def late(self) -> "Statistics | None":
        """The Grams, energies and counts of what came since the mark; None without one."""
        if self.early is None:
            return None
        return Statistics(
            tokens=self.tokens - self.early.tokens,
            input_gram=self.input_gram and self.input_gram.late,
            output_gram=self.output_gram and self.output_gram.late,
            input_energy=self.input_energy - self.early.input_energy,
            gradient_gram=self.gradient_gram and self.gradient_gram.late,
            pulled_gradient_gram=self.pulled_gradient_gram and self.pulled_gradient_gram.late,
            gradient_energy=self.gradient_energy - self.early.gradient_energy,
            predictions=self.predictions - self.early.predictions,
        )

    @property
    def grams(self) -> list[Gram]:
        """The Grams that were collected."""
        grams = (self.input_gram, self.output_gram, self.gradient_gram, self.pulled_gradient_gram)
        return [gram for gram in grams if gram is not None]


def mark_three_quarters(collected: Iterable[Statistics], done: int, total: int) -> None:
    """Called after each of `total` batches: marks the statistics when three quarters are done (not of one batch)."""
    if total > 1 and done == max(1, total * 3 // 4):
        for statistics in collected:
            statistics.mark()


@dataclass(frozen=True)
class GroupStatistics:
    """The statistics of the members of a group, in the group's order."""

    members: tuple[Statistics, ...] = field(default_factory=tuple)

    @property
    def drift(self) -> float | None:
        """The most that a Gram of a member moved over the last quarter of the batches; None if that is unknown."""
        of_grams = [gram.drift for member in self.members for gram in member.grams]
        drifts = [drift for drift in of_grams if drift is not None]
        return max(drifts) if drifts else None

    @property
    def early_and_late(self) -> "tuple[GroupStatistics, GroupStatistics] | None":
        """What was collected before and after the mark of three quarters; None if a member has no mark."""
        early = tuple(member.early for member in self.members if member.early is not None)
        late = tuple(member.late for member in self.members if member.late is not None)
        if not len(early) == len(late) == len(self.members) or not self.members:
            return None
        return GroupStatistics(early), GroupStatistics(late)

    def input_side(self, damping: float) -> Side | None:
        """The summed input Gram of the members as a side of a metric, or None if it was not collected."""
        grams = tuple(member.input_gram for member in self.members if member.input_gram is not None)
        if len(grams) < len(self.members):
            return None
        return grams[0].plus(grams[1:]).side(damping)

    def input_metric(self, weight: Tensor, damping: float) -> Metric:
        """The SVD-LLM metric: errors weighed by the input Gram, whichever side it was collected on."""
        right = self.input_side(damping)
        if right is not None:
            return Metric(right=right)
        (member,) = self.members
        assert member.output_gram is not None
        weight = weight.double()
        damp = damping * (member.input_energy if member.input_energy > 0 else 1.0)
        return Metric(right=None, outer=member.output_gram.matrix + damp * (weight @ weight.T))
