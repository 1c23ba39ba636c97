"""Sensitivity threshold: every group is cut as far as it can be with its own measured loss under one bound (ASVD)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from eckart import ledger
from eckart.allocators.base import Allocator, checked, entry_for
from eckart.errors import BudgetError, OptionError
from eckart.types import Budget, Entry, Spectrum


@final
@dataclass(frozen=True)
class SensitivityThreshold(Allocator):
    """The rank search of ASVD (Yuan et al., arXiv 2312.05821, sec. 3.3).

    Each group alone is cut to each of the `shares`, all others dense, and the model's loss measured on the first
    `windows` calibration windows, cut to `length` tokens: here the KL divergence from the dense model, there the
    perplexity. One bound holds for all groups: each takes its smallest share whose loss is within it, or stays dense.
    The bound is the lowest at which the plan is within the budget, as the release finds it by bisection over
    the sorted losses.
    """

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    windows: int = 32
    length: int = 2048
    wants: ClassVar[tuple[str, ...]] = ("sensitivity_alone",)

    def __post_init__(self) -> None:
        try:
            values = tuple(sorted(float(share) for share in self.shares))
        except ValueError:
            raise OptionError(f"sensitivity_threshold.shares is {self.shares!r}, but must be shares.") from None
        if not values or not all(0 < share < 1 for share in values):
            raise OptionError(f"sensitivity_threshold.shares is {values!r}, but shares lie in (0, 1).")
        object.__setattr__(self, "shares", values)

    @property
    def needs_predictions(self) -> bool:
        return True

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        groups = [spectrum.group for spectrum in spectra]
        allowed = ledger.allowed_parameters(groups, budget.keep)
        bounds = sorted({loss for s in spectra for share, loss in self._curve(s).items() if share < 1})
        low, high = (
            -1,
            len(bounds) - 1,
        )  # nothing is cut below the first bound; the last one admits every smallest share
        if self._spent(spectra, budget, bounds[high]) > allowed:
            smallest = self._spent(spectra, budget, bounds[high]) / sum(group.parameters for group in groups)
            raise BudgetError(
                f"keep is {budget.keep:g}, but with the smallest of sensitivity_threshold.shares everywhere "
                f"{smallest:.4f} is kept; ask for more, or add smaller shares."
            )
        if budget.keep == 1:
            return [entry_for(group, 1.0, budget) for group in groups]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._spent(spectra, budget, bounds[middle]) <= allowed else (middle, high)
        return [entry_for(s.group, self._share(s, bounds[high]), budget) for s in spectra]

    def _spent(self, spectra: Sequence[Spectrum], budget: Budget, bound: float) -> int:
        """Parameters of the plan at a bound on the loss of each group."""
        entries = [entry_for(s.group, self._share(s, bound), budget) for s in spectra]
        return sum(ledger.parameters(s.group, e.rank, e.storage) for s, e in zip(spectra, entries, strict=True))

    def _share(self, spectrum: Spectrum, bound: float) -> float:
        """The smallest share whose measured loss is within the bound; 1, dense, if there is none."""
        curve = self._curve(spectrum)
        return next((share for share in self.shares if curve[share] <= bound), 1.0)

    def _curve(self, spectrum: Spectrum) -> dict[float, float]:
        curve = spectrum.observed.get("sensitivity_alone")
        if curve is None:
            raise OptionError(
                f"{spectrum.group.name}: the threshold needs measured losses, and its spectrum has none; "
                "compress through a recipe, which measures them, or choose another allocator."
            )
        return dict(curve)
