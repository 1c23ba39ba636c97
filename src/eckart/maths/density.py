"""Measures of information density: how many directions of a spectrum matter, as a number in [1, full rank].

Each takes the singular values `[full_rank]` of a whitened weight, falling. A zero spectrum has
density 1. Four measures that are often confused:

- energy effective rank: exp of the entropy of the normalised *squares* (D-Rank, arXiv 2509.25622, eq. 1-2);
- effective rank: exp of the entropy of the normalised values themselves (Roy and Vetterli 2007);
- stable rank: sum of squares by the largest square;
- rank at 95 % energy: how many values hold 95 % of the sum of squares.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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


MEASURES: dict[str, Callable[[Tensor], float]] = {
    measure.__name__: measure for measure in (energy_effective_rank, effective_rank, stable_rank, rank_at_95)
}


def _entropy_rank(weights: Tensor) -> float:
    total = weights.sum()
    return float(torch.special.entr(weights / total).sum().exp()) if total > 0 else 1.0
