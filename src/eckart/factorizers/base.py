"""The contract of a factorizer.

Most methods differ only in their metric and override `metric`; a method of another kind overrides
`decompose`. Nothing here sees a model: weights and statistics in, a decomposition out.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from eckart.errors import NumericalError, PlanError
from eckart.linalg import Decomposition, Metric, Side
from eckart.statistics.sums import GRADIENT_NEEDS, GroupStatistics, Need
from eckart.support.escaping import plain
from eckart.types import Entry, Factors, Group, Spectrum


class GroupDecomposition:
    """The decomposition of a group's stacked weight: a spectrum, and factors at any rank.

    `drift` is by how much its metric moved over the last quarter of the calibration, None if that is unknown.
    `details` are figures behind its metric, for the plan; `note` is a line for the log, said once for all groups.
    """

    drift: float | None = None
    note: str | None = None

    def __init__(self, group: Group, decomposition: Decomposition, nats: float | None = None) -> None:
        self.group = group
        self.decomposition = decomposition
        self.spectrum = Spectrum(group, decomposition.values.cpu(), nats)
        self.details: dict[str, Any] = {}

    def close(self) -> None:
        """Keep only what cuts need; called once, when nothing is predicted from the metric any more."""
        self.decomposition.close()

    def spill(self, folder: Path) -> None:
        """Move what cuts need to a file in `folder`, from where each cut reads it back."""
        self.decomposition.spill(folder / f"{self.group.name}.safetensors")

    def settle(self, entry: Entry) -> Entry:
        """The entry with everything decided that an allocator left open (here nothing), and with `details`."""
        return replace(entry, details={**entry.details, **self.details}) if self.details else entry

    @property
    def apart(self) -> list[Spectrum]:
        """The spectra of what may have a rank of its own: one, unless members have a basis each."""
        return [self.spectrum]

    def cuts(self, rank: int, kept: int | None = None) -> "list[tuple[Group, Factors]]":
        """Factors at this rank and the targets that they replace: all of the group, if they share a basis."""
        return [(self.group, self.truncate(rank, kept))]

    def truncate(self, rank: int, kept: int | None = None) -> Factors:
        """Factors of the best replacement of rank `rank`, 1 <= rank <= full rank, with `kept` columns exact.

        Raises `PlanError` for preserved columns, which only a column-preserving factorizer can choose.
        """
        if kept:
            raise PlanError(
                f"{self.group.name}: {kept} preserved columns in the plan, but this factorizer preserves none; "
                "replay the plan with its own recipe, or with --option factorizer=column_preserving."
            )
        basis, coefficients = self.decomposition.truncate(rank)
        return Factors(basis, torch.split(coefficients, [t.out_features for t in self.group.targets]))


@dataclass(frozen=True)
class Factorizer(ABC):
    """Decomposes weights. The fields of the dataclass are the method's options."""

    needs: ClassVar[tuple[Need, ...]] = ()

    @property
    def needs_predictions(self) -> bool:
        """Whether statistics come from the model's loss, and so from logits of a next token."""
        return bool(GRADIENT_NEEDS & set(self.needs))

    @abstractmethod
    def metric(self, weight: Tensor, statistics: GroupStatistics) -> Metric:
        """The metric for one group; `weight` is `[out, in]`, stacked."""

    def sides(self, statistics: GroupStatistics, details: Mapping[str, Any]) -> tuple[Side, Side]:
        """Both sides of the metric, of the outputs and of the inputs, from statistics with whole Grams.

        Rounding needs both, where a decomposition knows one of them through the weight alone. `details` are those of
        the group's decomposition.
        """
        metric = self.metric(torch.empty(0, 0), statistics)
        assert metric.left is not None
        assert metric.right is not None
        return metric.left, metric.right

    def nats(self, statistics: GroupStatistics) -> float | None:
        """Predicted loss, in nats per token, of one unit of squared error; `None` if the metric cannot say."""
        return None

    def plain(self) -> "Factorizer":
        """The plain factorizer whose cuts are measured for this one; most are plain themselves."""
        return self

    def judged_by_its_own_text(self) -> "Factorizer":
        """The same without losses from unseen text: those of few bits are told by the text that made them."""
        return self

    def decompose(self, group: Group, weights: Sequence[Tensor], statistics: GroupStatistics) -> GroupDecomposition:
        """Decompose the weights `[out_i, in]` of a group, once.

        Raises `NumericalError` naming the group when the result is not finite.
        """
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        with failures_named(group):
            decomposition = Decomposition(weight, self.metric(weight, statistics))
        if not torch.isfinite(decomposition.values).all():
            raise NumericalError(f"{group.name}: NaN or infinity in its spectrum.")
        return GroupDecomposition(group, decomposition, self.nats(statistics))


@contextmanager
def failures_named(group: Group) -> Iterator[None]:
    """An eigenproblem that fails becomes a `NumericalError` that names the group."""
    try:
        yield
    except RuntimeError as error:  # torch's LinAlgError is one
        raise NumericalError(f"{group.name}: eigendecomposition failed: {plain(error)}") from None
