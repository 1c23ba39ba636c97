"""Shrinkage chosen by held-out prediction: the candidate whose cuts lose least on text that their metric has not seen.

A Gram mark (`eckart.statistics`) splits the calibration: the metric of the first three quarters makes the cuts, the
Grams of the last quarter, which are the total less the first three, say what they lose. What is chosen is then used
with all of it; that a third more text would bear a little less shrinkage is neglected.
"""

from collections.abc import Iterable

from torch import Tensor

from eckart import ledger
from eckart.linalg import Decomposition, Metric
from eckart.types import Group

CANDIDATES = (0.1, 0.03, 0.3)  # the first wins ties, and is taken where nothing can be held out
SHARES = (0.6, 0.8)  # of a group's parameters, stored as a pair: the cuts that are judged


def held_out_errors(
    group: Group, weight: Tensor, metrics: Iterable[tuple[float, Metric]], unseen: Metric
) -> dict[float, float]:
    """For each candidate and its metric the squared errors of its cuts at `SHARES` in the metric `unseen`, summed.

    `weight` is `[out, in]`, stacked. All metrics know it from the same side, which is enough
    (`Decomposition.tails_in`). Each candidate costs a decomposition, done for one at a time.
    """
    allowances = (ledger.share(share) * group.parameters for share in SHARES)
    ranks = [min(max(1, ledger.largest_rank(group, allowance)), group.full_rank) for allowance in allowances]
    errors = {}
    for candidate, metric in metrics:
        errors[candidate] = float(Decomposition(weight, metric).tails_in(unseen)[ranks].sum())
    return errors
