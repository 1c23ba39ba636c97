"""What one rank for all experts of a layer costs, by the metric's own prediction."""

from collections.abc import Sequence

from eckart.allocators.base import Allocator
from eckart.planning.decomposed import Decomposed
from eckart.planning.goals import predicted_kl
from eckart.types import Budget, Entry, Spectrum


def evenness(
    decomposed: Decomposed, entries: Sequence[Entry], allocator: Allocator, budget: Budget
) -> dict[str, float | None]:
    """The predicted KL in nats per token of even ranks, and of free ones that the allocator gives for the same budget.

    `entries` are the even plan. Empty without even experts, for metrics that predict no loss, and for allocators that
    measure: free ranks would cost them a measurement for every expert.
    """
    measures = bool(allocator.wants) or allocator.probe_windows() is not None
    if measures or not decomposed.predicts or not any(group.own_bases for group in decomposed.groups):
        return {}
    free: list[Spectrum] = [one for decomposition in decomposed.values() for one in decomposition.apart]
    chosen = allocator.allocate(free, budget)
    return {
        "predicted_kl_even": predicted_kl(decomposed.spectra, entries),
        "predicted_kl_free": predicted_kl(free, chosen),
    }
