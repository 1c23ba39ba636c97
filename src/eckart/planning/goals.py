"""What a user may ask of a plan: a share of the parameters, a size in bytes, or a bound on the predicted loss.

Each is answered by the share that meets it, found by allocating again: spectra are made and observed once, and an
allocation costs milliseconds. So every goal works with every allocator.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.errors import BudgetError, OptionError
from eckart.plans.plan import Plan
from eckart.types import Entry, Spectrum, Target

DEFAULT_KEEP = 0.8
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STEPS = 22  # of the bisection: a share to one part in four million


@dataclass(frozen=True)
class Goal:
    """Exactly one of: `keep`, share of the targets' parameters; `size`, bytes; `max_kl`, nats per token; `bits`.

    `size` is the whole model's weight files, `max_kl` the predicted KL divergence from the dense model, `bits` what
    one weight of the targets takes, scales and all else counted.
    """

    keep: float | None = None
    size: int | None = None
    max_kl: float | None = None
    bits: float | None = None

    @staticmethod
    def of(
        keep: float | None,
        size: int | str | None,
        max_kl: float | None,
        bits: float | None = None,
        default_bits: float | None = None,
    ) -> "Goal":
        """Check the request; no goal at all means a share of 0.8, or `default_bits`. Raises `OptionError` for two."""
        asked = (("keep", keep), ("size", size), ("max_kl", max_kl), ("bits", bits))
        names = [n for n, v in asked if v is not None]
        if len(names) > 1:
            raise OptionError(f"{' and '.join(names)} were both asked for, but a plan has one goal; give one of them.")
        if max_kl is not None and not max_kl > 0:
            raise OptionError(f"max_kl is {max_kl:g}, but must be a positive number of nats per token, such as 0.05.")
        if bits is not None and not 1 < bits <= 16:
            raise OptionError(f"bits is {bits:g}, but must lie in (1, 16]: bits per weight, as in 3.5.")
        if not names:
            keep, bits = (DEFAULT_KEEP, None) if default_bits is None else (None, default_bits)
        return Goal(keep, None if size is None else parse_size(size), max_kl, bits)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def parse_size(size: int | str) -> int:
    """Bytes of `80MB`, `1.5 GiB` or a plain number. Raises `OptionError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise OptionError(f"size is {size!r}, but must be a positive number of bytes, such as 80MB, 1.5GB or 64MiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def meet(goal: Goal, plan_for: Callable[[float], Plan], overhead: int = 0) -> Plan:
    """The plan that meets a goal: the largest within a size, the smallest within a predicted loss.

    `plan_for(keep)` allocates; `overhead` is what the files hold besides the tensors, in bytes. Raises
    `BudgetError` when no share meets the goal, `OptionError` for a bound on a loss that nobody predicts.
    """
    if goal.keep is not None:
        return plan_for(goal.keep)
    everything = plan_for(1.0)
    if goal.size is not None:
        room = goal.size - overhead
        return _last(plan_for, lambda plan: plan.reached["model_bytes_kept"] <= room, everything, f"size {goal.size}")
    most = goal.max_kl
    assert most is not None
    if "predicted_kl" not in everything.reached:
        raise OptionError(
            "max_kl needs a recipe that predicts the loss, one with factorizer two_sided; "
            "choose another recipe, or ask for keep or size."
        )
    return _first(plan_for, lambda plan: plan.reached["predicted_kl"] <= most, everything)


def meet_in_bytes(goal: Goal, plan_for: Callable[[int], Plan], dense: Plan, rest: int, overhead: int) -> Plan:
    """The plan with few bits that meets a goal: `plan_for(bytes)` allocates bytes to the targets.

    `dense` is the plan that leaves all as it is, `rest` the bytes of what is never compressed. Raises `BudgetError`
    when no plan meets the goal.
    """
    weights = dense.reached["target_parameters_dense"]
    if goal.bits is not None:
        return plan_for(int(goal.bits * weights / 8))
    if goal.size is not None:
        return plan_for(goal.size - overhead - rest)
    most = goal.max_kl
    assert most is not None
    per_weight = (dense.reached["model_bytes_kept"] - rest) / weights
    return _first(
        lambda share: plan_for(int(share * per_weight * weights)),
        lambda plan: plan.reached["predicted_kl"] <= most,
        dense,
    )


def predicted_kl(spectra: Sequence[Spectrum], entries: Sequence[Entry]) -> float | None:
    """Summed predicted loss of the entries, nats per token; None if a metric cannot say.

    To second order the KL divergence of the cut model from the dense one, as if each cut were alone.
    """
    losses = [None if e.kept else s.predicted(e) for s, e in zip(spectra, entries, strict=True)]
    known = [loss for loss in losses if loss is not None]
    return sum(known) if len(known) == len(losses) else None


def _last(plan_for: Callable[[float], Plan], fits: Callable[[Plan], bool], everything: Plan, what: str) -> Plan:
    """The plan of the largest share that fits, where a larger share never fits better."""
    if fits(everything):
        return everything
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = _try(plan_for, middle)
        if plan is None or fits(plan):
            low, best = middle, plan or best
        else:
            high = middle
    if best is None:
        raise BudgetError(f"{what} is below what the smallest ranks need; ask for more.")
    return best


def _first(plan_for: Callable[[float], Plan], fits: Callable[[Plan], bool], everything: Plan) -> Plan:
    """The plan of the smallest share that fits; `everything`, which is all dense, always does."""
    low, high, best = 0.0, 1.0, everything
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = _try(plan_for, middle)
        if plan is not None and fits(plan):
            high, best = middle, plan
        else:
            low = middle
    return best


def _try(plan_for: Callable[[float], Plan], keep: float) -> Plan | None:
    """None when the share is out of reach."""
    try:
        return plan_for(keep)
    except BudgetError:
        return None


def header_bytes(tensors: Iterable[str], targets: Iterable[Target], each: int = 3) -> int:
    """At least what safetensors files hold besides the tensors: one entry of JSON for each name.

    `each` target has as many tensors in place of its weight: factors, an index; nine where numbers are packed.
    """
    entry = 120  # dtype, shape and offsets of a tensor, with room to spare
    factors = sum(each * (len(target.name) + len(".coefficients.weight") + entry) for target in targets)
    return 1000 + factors + sum(len(name) + entry for name in tensors)
