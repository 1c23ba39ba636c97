"""CPSVD: blocks share the removal by how little they change their input, modules by how little a cut errs.

The allocation of the first version of the Duo-SVD paper; no measured curves, one forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi, tan
from typing import ClassVar, final

from eckart import ledger
from eckart.allocators.base import Allocator, checked, entry_at
from eckart.errors import BudgetError, OptionError
from eckart.types import Budget, Entry, Spectrum

RATIOS = tuple(step / 10 for step in range(1, 10))  # kept shares at which relative losses are compared
MOST = 0.9  # share of a block or module that may be removed; what is beyond goes to the others


@final
@dataclass(frozen=True)
class CPSVD(Allocator):
    """Similarity-based layer shares, error-ranked module shares (arXiv 2510.19385 v1).

    Block l loses a share in proportion to `softmax(-s_l / temperature)` with `s_l = 1 - cos(x_in, x_out)`.
    In a block that loses the share rho, modules are ranked from most to least sensitive (0, 1, ...) by
    their relative truncation error at the nearest of nine shares to the one that is kept (the release looks it up at
    the share that is removed, which the text does not say), and module i loses in proportion to
    `size_i * exp(rank_i / (1 + 10 tan(pi rho / 2)))`. No block or module loses more than 90 %; the
    release has no such bound. A module that loses nothing stays dense.
    """

    temperature: float = 0.1
    wants: ClassVar[tuple[str, ...]] = ("similarity",)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise OptionError(f"cpsvd.temperature is {self.temperature:g}, but must be above 0.")

    def allocate(self, spectra: Sequence[Spectrum], budget: Budget) -> list[Entry]:
        checked(spectra, budget)
        if 1 - budget.keep > MOST:
            raise BudgetError(f"keep is {budget.keep:g}, but cpsvd keeps at least {1 - MOST:.1f} of every module.")
        blocks: dict[int, list[int]] = {}
        for number, spectrum in enumerate(spectra):
            blocks.setdefault(spectrum.group.targets[0].block, []).append(number)
        sizes = [sum(spectra[i].group.parameters for i in members) for members in blocks.values()]
        weights = [
            size * exp(-(1 - _similarity(spectra[members[0]])) / self.temperature)
            for size, members in zip(sizes, blocks.values(), strict=True)
        ]
        removed = shared_out((1 - budget.keep) * sum(sizes), weights, [MOST * size for size in sizes])
        entries: dict[int, Entry] = {}
        for members, size, removal in zip(blocks.values(), sizes, removed, strict=True):
            own = [spectra[i] for i in members]
            for i, lost in zip(members, _within_block(own, removal, removal / size), strict=True):
                entries[i] = _entry(spectra[i], lost, budget)
        return [entries[i] for i in range(len(spectra))]


def _similarity(spectrum: Spectrum) -> float:
    if "similarity" not in spectrum.observed:
        raise OptionError(
            f"{spectrum.group.name}: cpsvd needs the similarity of its block, which a recipe measures; "
            "compress through a recipe, or choose another allocator."
        )
    return float(spectrum.observed["similarity"])


def _within_block(spectra: Sequence[Spectrum], removal: float, share_removed: float) -> list[float]:
    """Parameters that each module of a block loses."""
    nearest = min(RATIOS, key=lambda ratio: abs(ratio - (1 - share_removed)))
    errors = []
    for spectrum in spectra:
        rank = ledger.largest_rank(spectrum.group, ledger.share(nearest) * spectrum.group.parameters)
        errors.append(spectrum.error(rank) ** 2 / max(spectrum.energy, 1e-300))
    order = sorted(range(len(spectra)), key=lambda i: -errors[i])  # most sensitive first
    damp = 1 + 10 * tan(pi * min(share_removed, MOST) / 2)
    sizes = [spectrum.group.parameters for spectrum in spectra]
    weights = [size * exp(order.index(i) / damp) for i, size in enumerate(sizes)]
    return shared_out(removal, weights, [MOST * size for size in sizes])


def shared_out(total: float, weights: Sequence[float], caps: Sequence[float]) -> list[float]:
    """`total` in proportion to `weights`, none above its cap; what a cap cuts off goes to the others."""
    shares = [0.0] * len(weights)
    free = set(range(len(weights)))
    while free:
        left = total - sum(shares[i] for i in range(len(weights)) if i not in free)
        scale = left / sum(weights[i] for i in free)
        over = {i for i in free if scale * weights[i] > caps[i]}
        for i in free:
            shares[i] = caps[i] if i in over else scale * weights[i]
        if not over:
            break
        free -= over
    return shares


def _entry(spectrum: Spectrum, lost: float, budget: Budget) -> Entry:
    """What a module that loses so many parameters has: dense if it loses none."""
    group = spectrum.group
    if lost <= 0:
        return entry_at(group, None, budget)
    rank = ledger.largest_rank(group, int(group.parameters - lost), ledger.admitted(group, budget.storage))
    return entry_at(group, ledger.rounded(rank, group, budget.rank_multiple), budget)
