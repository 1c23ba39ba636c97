"""Column preserving: some input columns stay exact, paid for with ranks; the rest as in SVD-LLM.

Differs from `svd_llm.py` in what it cuts, not in its metric: without kept columns it is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from eckart import ledger
from eckart.errors import NumericalError, OptionError
from eckart.factorizers.base import Factorizer, GroupDecomposition
from eckart.factorizers.svd_llm import SVDLLM
from eckart.linalg import DAMPING, Metric
from eckart.maths.columns import Splits, column_scores, kept_for, positive_definite, split
from eckart.maths.golden import golden_section, lowest_valley
from eckart.statistics.sums import GroupStatistics, Need
from eckart.types import Entry, Factors, Group


@final
@dataclass(frozen=True)
class ColumnPreserving(Factorizer):
    """The module level of Duo-SVD (arXiv 2510.19385 v2, step 3b; all defaults are the release's).

    A pair of rank r may give up d ranks for `kept_for(d)` columns at no more parameters. Columns are
    ranked once, by what their residual after the plain cut does to the output. The best d is looked
    for by golden section and taken only if the error falls by more than `acceptance`.
    `early_exit`: try two splits first and give up if neither is better than none (v2; v1 does not).
    `compensated`: fit kept columns and low-rank part together (`eckart.maths.columns`); never worse for the
    same columns, which are ranked alike (`docs/decisions/0020-preserved-columns.md`).

    One module costs the plain decomposition, one Cholesky factor and one product to set up, then one
    eigenvalue problem without vectors for each split: two with an early exit, about ten otherwise (fifteen
    for the compensated error, which has several valleys); one more decomposition if columns are kept.
    """

    damping: float = DAMPING
    acceptance: float = 0.01
    early_exit: bool = True
    compensated: bool = False
    needs: ClassVar[tuple[Need, ...]] = (Need.INPUT_GRAM,)

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance < 1:
            raise OptionError(f"column_preserving.acceptance is {self.acceptance:g}, but must lie in [0, 1).")

    def metric(self, weight: Tensor, statistics: GroupStatistics) -> Metric:
        return statistics.input_metric(weight, self.damping)

    def decompose(self, group: Group, weights: Sequence[Tensor], statistics: GroupStatistics) -> GroupDecomposition:
        plain = super().decompose(group, weights, statistics)
        side = statistics.input_side(self.damping)
        assert side is not None
        assert side.gram is not None
        return ColumnDecomposition(self, plain, side.gram)

    def plain(self) -> Factorizer:
        return SVDLLM(self.damping)


class ColumnDecomposition(GroupDecomposition):
    """A plain decomposition that can trade ranks for columns. Keeps the damped input Gram `[in, in]`, float64.

    Layers with one input share it, and it is not copied.
    """

    def __init__(self, method: ColumnPreserving, plain: GroupDecomposition, gram: Tensor) -> None:
        super().__init__(plain.group, plain.decomposition)
        self.method, self._gram = method, gram

    @cached_property
    def gram(self) -> Tensor:
        """The Gram, positive definite; most often as it is."""
        try:
            return positive_definite(self._gram)
        except RuntimeError:
            raise NumericalError(f"{self.group.name}: its input Gram is not positive definite.") from None

    def settle(self, entry: Entry) -> Entry:
        """Decide how many columns are kept, if the entry leaves it open."""
        if entry.rank is None or entry.kept is not None or entry.storage != "pair":
            return entry
        rank, kept = self.search(entry.rank)
        return replace(entry, rank=rank, kept=kept, storage="columns" if kept else "pair")

    def search(self, rank: int) -> tuple[int, int]:
        """`(rank, kept)` of the best split at no more parameters than a plain pair of `rank`."""
        splits = self._splits(rank)
        out_features, in_features = self.decomposition.weight.shape

        @cache
        def error(given_up: int) -> float:
            kept = kept_for(given_up, rank, out_features, in_features)
            return sqrt(splits.squared_error(rank - given_up, kept))

        plain = self.spectrum.error(rank)
        most = rank - 1  # at least one rank stays
        probes = {min(most, round(0.382 * rank)), min(most, round(0.618 * 0.146 * rank))} - {0}
        if not probes or (self.method.early_exit and all(error(probe) >= plain for probe in probes)):
            return rank, 0
        search = lowest_valley if self.method.compensated else golden_section
        best = search(0, most, lambda given_up: error(given_up) if given_up else plain)
        best = min({best, *probes}, key=lambda given_up: error(given_up) if given_up else plain)
        if best == 0 or not error(best) < (1 - self.method.acceptance) * plain:
            return rank, 0
        return rank - best, kept_for(best, rank, out_features, in_features)

    def truncate(self, rank: int, kept: int | None = None) -> Factors:
        if not kept:
            return super().truncate(rank)
        order = self._order(self._plain_rank(rank, kept))
        weight = self.decomposition.weight
        pieces = split(weight, self.gram, order[:kept], rank, self.method.compensated)
        sizes = [target.out_features for target in self.group.targets]
        return Factors(
            pieces.basis, torch.split(pieces.coefficients, sizes), pieces.kept_index, torch.split(pieces.kept, sizes)
        )

    def _plain_rank(self, rank: int, kept: int) -> int:
        """Rank of the plain pair that this split was traded from: `kept_for` loses less than one rank."""
        spent = ledger.parameters(self.group, rank, "columns", kept)
        return min(-(-spent // ledger.parameters(self.group, 1)), self.group.full_rank)

    def _order(self, rank: int) -> Tensor:
        """Columns by falling score after a plain cut at `rank`."""
        basis, coefficients = self.decomposition.truncate(rank)
        residual = self.decomposition.weight.double() - coefficients.double() @ basis.double()
        return column_scores(residual, self.gram).argsort(descending=True, stable=True)

    def _splits(self, rank: int) -> Splits:
        return Splits(self.decomposition.weight, self.gram, self._order(rank), self.method.compensated)
