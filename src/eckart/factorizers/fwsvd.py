"""FWSVD: one side of the metric is diagonal, from the Fisher information of the weight."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from eckart.factorizers.base import Factorizer
from eckart.linalg import DAMPING, Metric, Side
from eckart.statistics.sums import GroupStatistics, Need


@final
@dataclass(frozen=True)
class FWSVD(Factorizer):
    """Minimises `||diag(sqrt(I)) (W - Ŵ)||_F` with I the summed Fisher of a row (Hsu et al., arXiv 2207.00112, eq. 5).

    The paper writes `Z = X W`, so its rows are our *input* features: `side = "input"`. `"output"`
    weighs the rows of `nn.Linear` instead (`docs/decisions/0004-fwsvd-side.md`). The Fisher is the
    empirical one, with exactly one label shift.
    """

    side: Literal["input", "output"] = "input"
    damping: float = DAMPING
    needs: ClassVar[tuple[Need, ...]] = (Need.WEIGHT_FISHER,)

    def metric(self, weight: torch.Tensor, statistics: GroupStatistics) -> Metric:
        if self.side == "input":
            columns = [m.fisher_columns for m in statistics.members if m.fisher_columns is not None]
            return Metric(right=Side(diagonal=torch.stack(columns).sum(0), damping=self.damping))
        rows = [m.fisher_rows for m in statistics.members if m.fisher_rows is not None]
        return Metric(left=Side(diagonal=torch.cat(rows), damping=self.damping))
