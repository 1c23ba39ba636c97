"""Measures of information density: how many directions of a spectrum matter, as a number in [1, full rank].

Each takes the singular values `[full_rank]` of a whitened weight, falling. A zero spectrum has
density 1. Four measures that are often confused:

- energy effective rank: exp of the entropy of the normalised *squares* (D-Rank, arXiv 2509.25622, eq. 1-2);
- effective rank: exp of the entropy of the normalised values themselves (Roy and Vetterli 2007);
- stable rank: sum of squares by the largest square;
- rank at 95 % energy: how many values hold 95 % of the sum of squares.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from eckart.types import Entry, Spectrum

Tensor = torch.Tensor


def energy_effective_rank(values: Tensor) -> float:
    """`exp(-sum p_i log p_i)` with `p_i = s_i^2 / sum s^2`."""
    return _entropy_rank(values.double().square())


def effective_rank(values: Tensor) -> float:
    """`exp(-sum p_i log p_i)` with `p_i = s_i / sum s`."""
    return _entropy_rank(values.double())


def stable_rank(values: Tensor) -> float:
    """`sum s_i^2 / max s_i^2`."""
    energy = values.double().square()
    return float(energy.sum() / energy.max()) if energy.max() > 0 else 1.0


def rank_at_95(values: Tensor) -> float:
    """Smallest r with `sum_{i<=r} s_i^2 >= 0.95 sum s^2`."""
    energy = values.double().square().cumsum(0)
    return float((energy < 0.95 * energy[-1]).sum() + 1)


POINTS = 24  # of a curve in a summary

MEASURES: dict[str, Callable[[Tensor], float]] = {
    measure.__name__: measure for measure in (energy_effective_rank, effective_rank, stable_rank, rank_at_95)
}


def describe(spectrum: Spectrum) -> dict[str, Any]:
    """A group with all four densities, as plain data."""
    group = spectrum.group
    shape = {"out": group.out_features, "in": group.in_features, "full_rank": group.full_rank}
    densities = {name: round(measure(spectrum.values), 3) for name, measure in MEASURES.items()}
    return {"targets": list(group.names), "kind": group.kind, **shape, **densities}


def summary(spectrum: Spectrum) -> dict[str, Any]:
    """What a checkpoint keeps of a spectrum: `describe`, and few points of how its error falls with rank.

    `lost` is `[[rank, share], ...]`: the share of the energy (squared error in the metric) that a cut at
    that rank loses, from 1 at rank 0 to 0 at full rank, about `POINTS` ranks closer together where they
    are low. `energy_nats` is the loss that losing all of it would cost, in nats per token, where the metric
    can say: at any rank the predicted loss is `energy_nats * share`. `measured_kl` is `Spectrum.measured`.
    """
    group, tails, energy = spectrum.group, spectrum.tails, spectrum.energy
    ranks = sorted({round(group.full_rank * (i / POINTS) ** 2) for i in range(POINTS + 1)})
    lost = [[rank, float(f"{float(tails[rank]) / energy if energy else 0.0:.4g}")] for rank in ranks]
    nats = {} if spectrum.nats is None else {"energy_nats": float(f"{spectrum.nats * energy:.6g}")}
    alone = {} if spectrum.measured is None else {"measured_kl": {f"{k:g}": v for k, v in spectrum.measured.items()}}
    return {**describe(spectrum), **nats, **alone, "lost": lost}


def with_figures(entry: Entry, spectrum: Spectrum) -> Entry:
    """The entry with the figures of its group before what else its details say.

    They are the energy effective rank and, where the metric knows it, the loss predicted of this choice alone.
    """
    loss = spectrum.loss(entry.rank)
    figures = {"energy_effective_rank": round(energy_effective_rank(spectrum.values), 3)}
    figures |= {} if loss is None else {"predicted_loss": float(f"{loss:.6g}")}
    return replace(entry, details={**figures, **entry.details})


def _entropy_rank(weights: Tensor) -> float:
    total = weights.sum()
    return float(torch.special.entr(weights / total).sum().exp()) if total > 0 else 1.0
