"""Plain SVD: both sides of the metric are the identity; no calibration data needed."""

from dataclasses import dataclass
from typing import final

import torch

from eckart.factorizers.base import Factorizer
from eckart.linalg import Metric
from eckart.statistics.sums import GroupStatistics


@final
@dataclass(frozen=True)
class SVD(Factorizer):
    """Minimises `||W - Ŵ||_F` (Eckart and Young 1936)."""

    def metric(self, weight: torch.Tensor, statistics: GroupStatistics) -> Metric:
        return Metric()
