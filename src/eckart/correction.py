"""Correct a predicted loss by measuring it: the KL of a few probes, each a part of the plan put in place alone.

The prediction takes the loss as quadratic and the errors of different matrices as independent. It is too
low, by factors that differ between the kinds of matrices. A probe puts the cuts of one kind (with "full"
also those of one run of blocks) into the dense model and measures the KL divergence; measured over predicted
is the factor of that kind. One more probe puts in everything at once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eckart.errors import BudgetError
from eckart.goals import Goal, predicted_kl
from eckart.plans import Plan
from eckart.progress import Progress, silent, track
from eckart.types import Entry, Spectrum

Level = Literal["off", "cheap", "full"]
RUNS = 5  # of blocks, with "full"
LEAST = 1e-9  # nats per token: a smaller prediction cannot be compared with a measurement
ROUNDS = 4  # of fitting factors of kinds and of runs of blocks together
ADJUSTMENTS = 5  # at most, to a bound on the KL
AIM, CLOSE = 0.98, 0.95  # what is aimed at, and what is close enough, in parts of the bound


@dataclass(frozen=True)
class Correction:
    """`factors[group name]` multiplies the group's predicted loss; `together` multiplies their sum.

    `measured` is the KL divergence in nats per token of the plan that was probed, as a whole.
    """

    factors: Mapping[str, float]
    together: float
    measured: float

    def apply(self, spectra: Sequence[Spectrum]) -> list[Spectrum]:
        """The spectra with corrected losses, whose sum is the corrected prediction."""
        return [
            s if s.nats is None else replace(s, nats=s.nats * self.factors[s.group.name] * self.together)
            for s in spectra
        ]

    def rescaled(self, measured: float, predicted: float) -> "Correction":
        """Made to predict `measured` where it predicted `predicted`."""
        return replace(self, together=self.together * measured / max(predicted, LEAST), measured=measured)


def measure_correction(
    spectra: Sequence[Spectrum],
    entries: Sequence[Entry],
    level: Level,
    kl: Callable[[Sequence[str]], float],
    progress: Progress = silent,
) -> Correction:
    """Fit the factors of a plan; `kl(names)` is the measured KL with the cuts of these groups alone in place.

    Costs one KL measurement for each kind of matrix and one for the whole; with "full" `RUNS` more.
    """
    predicted = {s.group.name: s.loss(e.rank) or 0.0 for s, e in zip(spectra, entries, strict=True)}
    parts = [*_by_kind(spectra), *(_by_run_of_blocks(spectra) if level == "full" else [])]
    probed = [members for members in parts if sum(predicted[name] for name in members) > LEAST]
    measured = [max(kl(members), LEAST) for members in track(probed, "probe", len(probed), progress)]
    factors = dict.fromkeys(predicted, 1.0)
    for _ in range(ROUNDS if level == "full" else 1):
        for members, found in zip(probed, measured, strict=True):
            ratio = found / sum(predicted[group] * factors[group] for group in members)
            factors |= {group: factors[group] * ratio for group in members}
    whole = max(kl(list(predicted)), LEAST)
    alone = sum(predicted[group] * factors[group] for group in predicted)
    return Correction(factors, whole / max(alone, LEAST), whole)


def corrected(
    goal: Goal,
    first: Plan,
    answer: Callable[[Correction | None], Plan],
    spectra: Sequence[Spectrum],
    level: Level,
    kl: Callable[[Sequence[Entry]], float],
    progress: Progress = silent,
) -> Plan:
    """The plan for a goal with corrected losses; it says what was predicted, and what was measured then.

    `first` is the plan without correction, `answer` makes one with it, `kl` measures one. For a bound on
    the KL the correction is adjusted until the measured KL is within the bound and close to it; raises
    `BudgetError` when no plan gets there.
    """

    def alone(names: Collection[str]) -> float:
        return kl([e if e.name in names else replace(e, rank=None) for e in first.entries])

    correction = measure_correction(spectra, first.entries, level, alone, progress)
    met: Plan | None = None
    for _ in range(ADJUSTMENTS):
        made = answer(correction)
        predicted, measured = made.reached["predicted_kl"], kl(made.entries)
        uncorrected = predicted_kl(spectra, made.entries)
        made = replace(made, reached={**made.reached, "predicted_kl_uncorrected": uncorrected, "measured_kl": measured})
        if goal.max_kl is None:
            return made
        if measured <= goal.max_kl:
            met = made if met is None or made.reached["keep"] < met.reached["keep"] else met
            if measured >= CLOSE * goal.max_kl:
                return made
        correction = correction.rescaled(measured / AIM, predicted)
    if met is None:
        raise BudgetError(f"max_kl is {goal.max_kl:g}, but no plan was found that measures at most that; ask for more.")
    return met


def _by_kind(spectra: Sequence[Spectrum]) -> list[list[str]]:
    """The names of the groups of each kind."""
    kinds = dict.fromkeys(s.group.kind for s in spectra)
    return [[s.group.name for s in spectra if s.group.kind == kind] for kind in kinds]


def _by_run_of_blocks(spectra: Sequence[Spectrum]) -> list[list[str]]:
    """The names of the groups in each of `RUNS` runs of blocks, from the first to the last."""
    blocks = max(s.group.targets[0].block for s in spectra) + 1
    runs = [[s.group.name for s in spectra if s.group.targets[0].block * RUNS // blocks == run] for run in range(RUNS)]
    return [run for run in runs if run]
