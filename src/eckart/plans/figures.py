"""Figures about a group and about what a plan chose for it, for people: in plans, spectra files and reports."""

from dataclasses import replace
from typing import Any

from eckart.maths.density import MEASURES, energy_effective_rank
from eckart.types import Entry, Spectrum

POINTS = 24  # of a curve in a summary


def describe(spectrum: Spectrum) -> dict[str, Any]:
    """A group with all four densities, as plain data."""
    group = spectrum.group
    shape = {"out": group.out_features, "in": group.in_features, "full_rank": group.full_rank}
    densities = {name: round(measure(spectrum.values), 3) for name, measure in MEASURES.items()}
    return {"targets": list(group.names), "kind": group.kind, **shape, **densities}


def summary(spectrum: Spectrum) -> dict[str, Any]:
    """What a checkpoint keeps of a spectrum: `describe`, and few points of how its error falls with rank.

    `lost` is `[[rank, share], ...]`: the share of the energy (squared error to expect in the metric) that a cut at
    that rank loses, from 1 at rank 0 to 0 at full rank, about `POINTS` ranks closer together where they
    are low. `energy_nats` is the loss that losing all of it would cost, in nats per token, where the metric
    can say: at any rank the predicted loss is `energy_nats * share`. `measured_kl` is the sensitivity,
    where it was measured.
    """
    group, tails = spectrum.group, spectrum.expected
    energy = float(tails[0])
    ranks = sorted({round(group.full_rank * (i / POINTS) ** 2) for i in range(POINTS + 1)})
    lost = [[rank, float(f"{float(tails[rank]) / energy if energy else 0.0:.4g}")] for rank in ranks]
    nats = {} if spectrum.nats is None else {"energy_nats": float(f"{spectrum.nats * energy:.6g}")}
    curve = spectrum.observed.get("sensitivity")
    alone = {} if curve is None else {"measured_kl": {f"{k:g}": v for k, v in curve.items()}}
    return {**describe(spectrum), **nats, **alone, "lost": lost}


def with_figures(entry: Entry, spectrum: Spectrum) -> Entry:
    """The entry with figures of its group put before its other details.

    They are the energy effective rank and, where the metric knows it, the loss predicted of this choice alone.
    """
    loss = spectrum.predicted(entry)
    figures = {"energy_effective_rank": round(energy_effective_rank(spectrum.values), 3)}
    figures |= {} if loss is None else {"predicted_loss": float(f"{loss:.6g}")}
    return replace(entry, details={**figures, **entry.details})
