"""Rebalance attention: some ranks of queries and keys go to the values (D-Rank, arXiv 2509.25622, eq. 9-12).

What moves is counted in parameters, which are ranks where costs are equal (multi-head attention) and
are not where they differ (grouped queries, a last group that is smaller). Pure arithmetic.
"""

from collections.abc import Sequence
from fractions import Fraction

from eckart.maths.lagrange import Bidder, total


def rebalance_(
    bidders: Sequence[Bidder], ranks: list[int], givers: Sequence[int], takers: Sequence[int], beta: Fraction
) -> None:
    """Move a share `beta` of the ranks of the givers (queries, keys) to the takers (values), in place.

    Every taker gets the same number of ranks, up to its cap. What is left over goes rank by rank to
    the taker that has fewest, and what no taker can hold goes back to the givers pro rata.
    """
    paid = {}
    for i in givers:
        before = ranks[i]
        ranks[i] = bidders[i].floor(before - round(beta * before))
        paid[i] = bidders[i].parameters(before) - bidders[i].parameters(ranks[i])
    purse = sum(paid.values())
    purse = _give_to_all(bidders, ranks, takers, purse)
    purse = _give_to_the_smallest(bidders, ranks, takers, purse)
    _refund(bidders, ranks, paid, purse)


def _give_to_all(bidders: Sequence[Bidder], ranks: list[int], takers: Sequence[int], purse: int) -> int:
    before = total([bidders[i] for i in takers], [ranks[i] for i in takers])
    gift = purse // sum(bidders[i].cost for i in takers)
    for i in takers:
        ranks[i] = max(bidders[i].floor(ranks[i] + gift), ranks[i])
    return purse - (total([bidders[i] for i in takers], [ranks[i] for i in takers]) - before)


def _give_to_the_smallest(bidders: Sequence[Bidder], ranks: list[int], takers: Sequence[int], purse: int) -> int:
    while affordable := [i for i in takers if ranks[i] < bidders[i].cap and _price(bidders[i], ranks[i]) <= purse]:
        smallest = min(affordable, key=lambda i: ranks[i])
        purse -= _price(bidders[smallest], ranks[smallest])
        ranks[smallest] = bidders[smallest].up(ranks[smallest])
    return purse


def _refund(bidders: Sequence[Bidder], ranks: list[int], paid: dict[int, int], purse: int) -> None:
    everything = sum(paid.values())
    owed = {i: Fraction(purse * parameters, max(everything, 1)) for i, parameters in paid.items()}
    for i in paid:  # at once what is whole ranks, then step by step to whom most is owed
        rank = max(bidders[i].floor(ranks[i] + owed[i] // bidders[i].cost), ranks[i])
        back = bidders[i].parameters(rank) - bidders[i].parameters(ranks[i])
        ranks[i], purse, owed[i] = rank, purse - back, owed[i] - back
    while affordable := [i for i in paid if ranks[i] < bidders[i].cap and _price(bidders[i], ranks[i]) <= purse]:
        creditor = max(affordable, key=lambda i: owed[i])
        price = _price(bidders[creditor], ranks[creditor])
        ranks[creditor], purse, owed[creditor] = (
            bidders[creditor].up(ranks[creditor]),
            purse - price,
            owed[creditor] - price,
        )


def _price(bidder: Bidder, rank: int) -> int:
    """Parameters of the next step."""
    return bidder.parameters(bidder.up(rank)) - bidder.parameters(rank)
