"""Correct a predicted loss by measuring it: the KL of a few probes, each a part of the plan in place alone.

The prediction takes the loss as quadratic and the errors of different matrices as independent. It is too
low, by factors that differ between the kinds of matrices and from block to block. A probe puts the cuts of one kind
into the dense model and measures the KL divergence; measured over predicted is the factor of that kind. One more probe
puts in everything at once. With "full" blocks are probed as kinds are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eckart.errors import BudgetError
from eckart.planning.goals import Goal, predicted_kl
from eckart.plans.plan import Plan
from eckart.types import Entry, Level, Part, Spectrum

RUNS = 32  # of blocks at most, with "full": the blocks themselves in a model that has no more
LEAST = 1e-9  # nats per token: a smaller prediction cannot be compared with a measurement
ROUNDS = 4  # of fitting the multipliers of kinds and of runs of blocks together
ADJUSTMENTS = 5  # at most, to a bound on the KL
AIM, CLOSE = 0.98, 0.95  # what is aimed at, and what is close enough, in parts of the bound


@dataclass(frozen=True)
class Correction:
    """`multipliers[group name]` multiplies the group's predicted loss; `together` multiplies their sum.

    `measured` is the KL divergence in nats per token of the plan that was probed, as a whole.
    """

    multipliers: Mapping[str, float]
    together: float
    measured: float

    def apply(self, spectra: Sequence[Spectrum]) -> list[Spectrum]:
        """The spectra with corrected losses, whose sum is the corrected prediction."""
        return [
            s if s.nats is None else replace(s, nats=s.nats * self.multipliers[s.group.name] * self.together)
            for s in spectra
        ]

    def rescaled(self, measured: float, predicted: float) -> "Correction":
        """Made to predict `measured` where it predicted `predicted`."""
        return replace(self, together=self.together * measured / max(predicted, LEAST), measured=measured)


def measure_correction(
    spectra: Sequence[Spectrum],
    entries: Sequence[Entry],
    level: Level,
    measure: Callable[[Sequence[Part]], list[float]],
) -> Correction:
    """Fit the multipliers of a plan; `measure(parts)` says what each part of it costs in KL, nats per token.

    The parts are names of groups: each kind of matrix, with "full" each of `RUNS` runs of blocks, and last the whole.
    """
    predicted = {s.group.name: s.predicted(e) or 0.0 for s, e in zip(spectra, entries, strict=True)}
    parts = [*_by_kind(spectra), *(_by_run_of_blocks(spectra) if level == "full" else [])]
    probed = [members for members in parts if sum(predicted[name] for name in members) > LEAST]
    *measured, whole = [max(kl, LEAST) for kl in measure([*probed, list(predicted)])]
    multipliers = dict.fromkeys(predicted, 1.0)
    for _ in range(ROUNDS if level == "full" else 1):
        for members, kl in zip(probed, measured, strict=True):
            ratio = kl / sum(predicted[group] * multipliers[group] for group in members)
            multipliers |= {group: multipliers[group] * ratio for group in members}
    alone = sum(predicted[group] * multipliers[group] for group in predicted)
    return Correction(multipliers, whole / max(alone, LEAST), whole)


def corrected(
    goal: Goal,
    first: Plan,
    answer: Callable[[Correction | None], Plan],
    spectra: Sequence[Spectrum],
    level: Level,
    measure: Callable[[Sequence[Part]], list[float]],
    kl: Callable[[Sequence[Entry]], float],
) -> Plan:
    """The plan for a goal, made with corrected losses; its `reached` has the predicted and the measured KL.

    `first` is the plan without correction. `answer(correction)` makes a plan, `measure(parts)` measures parts of
    `first`, and `kl(entries)` a whole plan. For a bound on the KL the correction is adjusted until the measured KL
    is within the bound and close to it; raises `BudgetError` when no plan gets there.
    """
    correction = measure_correction(spectra, first.entries, level, measure)
    met: Plan | None = None
    for _ in range(ADJUSTMENTS):
        plan = answer(correction)
        predicted, measured = plan.reached["predicted_kl"], kl(plan.entries)
        uncorrected = predicted_kl(spectra, plan.entries)
        plan = replace(plan, reached={**plan.reached, "predicted_kl_uncorrected": uncorrected, "measured_kl": measured})
        if goal.max_kl is None:
            return plan
        if measured <= goal.max_kl:
            met = plan if met is None or _cost(plan) < _cost(met) else met
            if measured >= CLOSE * goal.max_kl:
                return plan
        correction = correction.rescaled(measured / AIM, predicted)
    if met is None:
        raise BudgetError(f"max_kl is {goal.max_kl:g}, but no plan was found that measures at most that; ask for more.")
    return met


def _cost(plan: Plan) -> float:
    """What is to be small: bits per weight where some are few, else the share that is kept."""
    cost: float = plan.reached.get("bits", plan.reached["keep"])
    return cost


def _by_kind(spectra: Sequence[Spectrum]) -> list[list[str]]:
    """The names of the groups of each kind."""
    kinds = dict.fromkeys(s.group.kind for s in spectra)
    return [[s.group.name for s in spectra if s.group.kind == kind] for kind in kinds]


def _by_run_of_blocks(spectra: Sequence[Spectrum]) -> list[list[str]]:
    """The names of the groups in each of at most `RUNS` runs of blocks, from the first to the last."""
    blocks = max(s.group.targets[0].block for s in spectra) + 1
    count = min(RUNS, blocks)
    runs = [[s.group.name for s in spectra if s.group.targets[0].block * count // blocks == n] for n in range(count)]
    return [run for run in runs if run]
