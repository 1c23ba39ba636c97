"""ASVD: the right side of the metric is diagonal, from the mean absolute input of each channel."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from eckart.errors import OptionError
from eckart.factorizers.base import Factorizer
from eckart.linalg import DAMPING, Metric, Side
from eckart.statistics.sums import GroupStatistics, Need


@final
@dataclass(frozen=True)
class ASVD(Factorizer):
    """Minimises `||(W - Ŵ) S||_F` with `S = diag(mean |x_j|)^alpha` (Yuan et al., arXiv 2312.05821, sec. 3.2).

    `alpha` 0.5 is the paper's default. `damping` is added to `S^2` as a fraction of its mean.
    """

    alpha: float = 0.5
    damping: float = DAMPING
    needs: ClassVar[tuple[Need, ...]] = (Need.INPUT_ABSMEAN,)

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise OptionError(f"asvd.alpha is {self.alpha:g}, but must not be negative.")

    def metric(self, weight: torch.Tensor, statistics: GroupStatistics) -> Metric:
        means = [m.input_absmean for m in statistics.members if m.input_absmean is not None]
        scale = torch.stack(means).mean(0) ** self.alpha
        return Metric(right=Side(diagonal=scale.square(), damping=self.damping))
