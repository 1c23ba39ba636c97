"""Error search: shares drawn from a prior on measured sensitivity, the best one by the model's own loss."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any, Literal, final

from eckart.allocators._share_candidates import draw_removal, draws, fit_ranks, mean_removed
from eckart.allocators.base import Allocator, Probe, checked, entry_at
from eckart.allocators.uniform import Uniform
from eckart.errors import NumericalError, OptionError
from eckart.types import Budget, Entry, Spectrum

log = logging.getLogger(__name__)

LEAST = 1e-3  # of the largest sensitivity: a unit that seems to cost nothing still costs this


@final
@dataclass(frozen=True)
class ErrorSearch(Allocator):
    """Samples non-uniform plans and keeps the one with the lowest loss (LC-SVD, ICLR 2026 no. 6575, as reconstructed).

    Each unit alone is compressed to the share `light` and the loss measured; its sensitivity is the rise.
    `per` says what a unit is: "block", or "kind" for each kind of matrix in each block. Of `candidates`
    plans the first is the uniform one; the others remove `(parameters / sensitivity)^kappa` with kappa
    from U(0, `kappa`) and log-normal `noise`, held within [0.25, 1.75] of the mean, exactly on the budget.
    All are scored on `windows` calibration windows; the best `finalists` that are no worse than uniform,
    and uniform, are scored on `held_out` other windows, and the best of these is taken.

    Without a probe (`allocate`), discarded energy stands in for the loss.
    """

    per: Literal["block", "kind"] = "block"
    candidates: int = 64
    finalists: int = 4
    light: float = 0.9
    kappa: float = 1.2
    noise: float = 0.15
    windows: int = 32
    held_out: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("candidates", "finalists", "windows", "held_out"):
            if getattr(self, name) < 1:
                raise OptionError(f"error_search.{name} is {getattr(self, name)}, but must be positive.")
        for name in ("kappa", "noise"):
            if not 0 <= getattr(self, name) < inf:
                raise OptionError(f"error_search.{name} is {getattr(self, name):g}, but must not be negative.")
        if not 0 < self.light < 1:
            raise OptionError(f"error_search.light is {self.light:g}, but must lie in (0, 1).")

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        return self.search(spectra, budget, lambda entries, held_out=False: discarded_energy(spectra, entries))

    def probe_windows(self) -> tuple[int, int] | None:
        return self.windows, self.held_out

    def search(self, spectra: Sequence[Spectrum], budget: Budget, probe: Probe) -> list[Entry]:
        checked(spectra, budget)
        uniform = Uniform().allocate(spectra, budget)
        if budget.keep == 1:
            return uniform
        units = self.units(spectra)
        sensitivities = self.sensitivities(spectra, budget, units, probe)
        plans = [uniform, *self.sample(spectra, budget, units, sensitivities)]
        scores = [probe(plan) for plan in plans]
        chosen, summary = self.choose(plans, scores, probe)
        log.info("error search: %s", summary)
        entries = [
            replace(entry, details={"sensitivity": float(f"{sensitivities[unit]:.6g}")})
            for entry, unit in zip(chosen, units, strict=True)
        ]
        return [replace(entries[0], details={**entries[0].details, "search": summary}), *entries[1:]]

    def units(self, spectra: Sequence[Spectrum]) -> list[int]:
        """The number of the unit of each group; a group over several blocks belongs to its first."""
        keys: dict[object, int] = {}
        numbers = []
        for spectrum in spectra:
            first = spectrum.group.targets[0]
            key = first.block if self.per == "block" else (first.block, first.kind)
            numbers.append(keys.setdefault(key, len(keys)))
        return numbers

    def sensitivities(
        self, spectra: Sequence[Spectrum], budget: Budget, units: Sequence[int], probe: Probe
    ) -> list[float]:
        """Rise of the loss when one unit alone keeps the share `light`, for each unit; at least a little."""
        light = Uniform().allocate(spectra, replace(budget, keep=self.light, rank_multiple=1))
        dense = [entry_at(spectrum.group, None, budget) for spectrum in spectra]
        base = probe(dense)
        if not isfinite(base):
            raise NumericalError(f"error_search: the loss of the dense model is {base}; check the model and the text.")
        rises = []
        for unit in range(max(units) + 1):
            rise = probe([a if u == unit else b for a, b, u in zip(light, dense, units, strict=True)]) - base
            rises.append(rise if isfinite(rise) else inf)
        largest = max((rise for rise in rises if isfinite(rise)), default=1.0)
        largest = largest if largest > 0 else 1.0
        return [min(max(rise, LEAST * largest), largest / LEAST) for rise in rises]

    def sample(
        self, spectra: Sequence[Spectrum], budget: Budget, units: Sequence[int], sensitivities: Sequence[float]
    ) -> list[list[Entry]]:
        """All candidates but the uniform one."""
        groups = [spectrum.group for spectrum in spectra]
        sizes = [0] * len(sensitivities)
        for group, unit in zip(groups, units, strict=True):
            sizes[unit] += group.parameters
        mean = mean_removed(groups, budget.keep)
        plans = []
        for kappa, noise in draws(self.candidates - 1, len(sizes), self.kappa, self.noise, self.seed):
            removed = draw_removal(sensitivities, sizes, mean, kappa, noise)
            ranks = fit_ranks(groups, [1 - removed[unit] for unit in units], budget)
            plans.append([entry_at(group, rank, budget) for group, rank in zip(groups, ranks, strict=True)])
        return plans

    def choose(
        self, plans: Sequence[list[Entry]], scores: Sequence[float], probe: Probe
    ) -> tuple[list[Entry], dict[str, Any]]:
        """The finalist with the lowest held-out loss; plan 0 is the uniform one and always a finalist."""
        order = sorted(range(len(plans)), key=lambda index: (scores[index], index))
        finalists = [index for index in order if scores[index] <= scores[0]][: self.finalists]
        finalists = finalists if 0 in finalists else [*finalists, 0]
        held_out = {index: probe(plans[index], held_out=True) for index in finalists}
        best = min(finalists, key=lambda index: (held_out[index], scores[index], index))
        figures = {
            "loss": scores[best],
            "loss_uniform": scores[0],
            "held_out_loss": held_out[best],
            "held_out_loss_uniform": held_out[0],
        }
        if not isfinite(scores[best]):
            raise NumericalError(
                "error_search: no candidate has a finite loss; ask for a larger share, or check --data."
            )
        rounded = {name: float(f"{value:.6g}") for name, value in figures.items()}
        return plans[best], {"chosen": best, "of": len(plans), **rounded}


def discarded_energy(spectra: Sequence[Spectrum], entries: Sequence[Entry]) -> float:
    """Sum over groups of the share of energy that the entries' ranks discard; dense groups discard none."""
    total = 0.0
    for spectrum, entry in zip(spectra, entries, strict=True):
        if entry.rank is not None and spectrum.energy > 0:
            total += spectrum.error(entry.rank) ** 2 / spectrum.energy
    return total
