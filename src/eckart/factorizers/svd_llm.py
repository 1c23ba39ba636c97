"""SVD-LLM: the right side of the metric is the input Gram (truncation-aware whitening)."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from eckart.factorizers.base import Factorizer
from eckart.linalg import DAMPING, Metric
from eckart.statistics.sums import GroupStatistics, Need


@final
@dataclass(frozen=True)
class SVDLLM(Factorizer):
    """Minimises `||(W - Ŵ) X||_F` over the calibration inputs X (Wang et al., arXiv 2403.07378, sec. 3.1).

    The same optimum as the paper's Cholesky whitening, through the eigenvectors of `W X X^T W^T`
    (or of the smaller equivalent), so it cannot fail on a singular Gram. `damping` is added to the
    diagonal of `X X^T` as a fraction of its mean.
    """

    damping: float = DAMPING
    needs: ClassVar[tuple[Need, ...]] = (Need.SMALLER_GRAM,)

    def metric(self, weight: torch.Tensor, statistics: GroupStatistics) -> Metric:
        return statistics.input_metric(weight, self.damping)
