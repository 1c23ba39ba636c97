"""Share a budget so that `sum R_g / k_g` is least (D-Rank, arXiv 2509.25622, eq. 4-7), in real and in whole numbers.

`R_g` is the density of a group, `k_g` its rank, `w_g` the parameters of one rank. Pure arithmetic:
no spectra, no names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, sqrt


@dataclass(frozen=True)
class Bidder:
    """A group that wants ranks.

    `cost` is the parameters of one rank, `cap` its largest rank. With a `ceiling` the cap stands for
    the dense matrices, which cost that many parameters and no more. Ranks move in steps of `multiple`.
    Where further ranks are cheaper than the first, `price` says what a rank costs in all, at most `rank * cost`.
    """

    density: float
    cost: int
    cap: int
    ceiling: int | None = None
    multiple: int = 1
    price: Callable[[int], int] | None = None

    def parameters(self, rank: int) -> int:
        spent = rank * self.cost if self.price is None else self.price(rank)
        return spent if self.ceiling is None else min(spent, self.ceiling)

    def floor(self, rank: float) -> int:
        """The largest allowed rank up to `rank`, at least 1; below the first multiple any rank is allowed."""
        whole = min(floor(rank + 1e-9), self.cap)
        return whole if whole == self.cap else max(whole // self.multiple * self.multiple or whole, 1)

    def up(self, rank: int) -> int:
        """The next allowed rank, or the cap."""
        return min((rank // self.multiple + 1) * self.multiple, self.cap)

    def down(self, rank: int) -> int:
        """The allowed rank before, or 1."""
        return max((rank - 1) // self.multiple * self.multiple if rank > self.multiple else rank - 1, 1)

    def gain(self, low: int, high: int) -> float:
        """How much `R / k` falls from rank `low` to rank `high`."""
        return self.density / low - self.density / high


def closed_form(bidders: Sequence[Bidder], budget: int) -> list[float]:
    """`k_g = T sqrt(R_g / w_g) / sum_j sqrt(R_j w_j)` (eq. 7), clipped to `[1, cap]`, spending T parameters.

    Where a clip binds, the others share what is left by the same rule.
    """
    wishes = [sqrt(b.density / b.cost) for b in bidders]

    def clipped(scale: float) -> list[float]:
        return [min(max(scale * wish, 1.0), float(b.cap)) for wish, b in zip(wishes, bidders, strict=True)]

    def spent(ranks: Sequence[float]) -> float:
        return sum(min(r * b.cost, b.ceiling or r * b.cost) for r, b in zip(ranks, bidders, strict=True))

    scale = budget / sum(wish * b.cost for wish, b in zip(wishes, bidders, strict=True))
    if all(1 <= scale * wish <= b.cap for wish, b in zip(wishes, bidders, strict=True)):
        return [scale * wish for wish in wishes]
    low, high = 0.0, max(b.cap / wish for wish, b in zip(wishes, bidders, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(clipped(middle)) <= budget else (low, middle)
    return clipped(low)


def integer_ranks(bidders: Sequence[Bidder], budget: int) -> list[int]:
    """Ranks that spend at most `budget` and leave less than one affordable step.

    The closed form is rounded down, the rest is spent where it lowers the objective most for each
    parameter, and steps are exchanged while that lowers it. With equal costs this is the integer
    optimum: the objective is separable and convex, and no single exchange can improve it. Where ranks get
    cheaper (`price`), the closed form is the start of the steps, and the answer is one that no step improves.
    """
    ranks = [b.floor(rank) for b, rank in zip(bidders, closed_form(bidders, budget), strict=True)]
    left = budget - total(bidders, ranks)
    left = spend_(bidders, ranks, left)
    while (swap := _best_exchange(bidders, ranks, left)) is not None:
        taker, giver = swap
        before = total(bidders, ranks)
        ranks[taker], ranks[giver] = bidders[taker].up(ranks[taker]), bidders[giver].down(ranks[giver])
        left = spend_(bidders, ranks, left + before - total(bidders, ranks))
    return ranks


def total(bidders: Sequence[Bidder], ranks: Sequence[int]) -> int:
    """Parameters of all ranks."""
    return sum(b.parameters(rank) for b, rank in zip(bidders, ranks, strict=True))


def spend_(bidders: Sequence[Bidder], ranks: list[int], left: int) -> int:
    """Raise `ranks` in place while a step fits in `left`, best gain for each parameter first; what is left then."""
    while True:
        best, best_price = None, 0.0
        for index, (b, rank) in enumerate(zip(bidders, ranks, strict=True)):
            price = b.parameters(b.up(rank)) - b.parameters(rank)
            if rank < b.cap and price <= left and b.gain(rank, b.up(rank)) / max(price, 1) > best_price:
                best, best_price = index, b.gain(rank, b.up(rank)) / max(price, 1)
        if best is None:
            return left
        b, rank = bidders[best], ranks[best]
        left -= b.parameters(b.up(rank)) - b.parameters(rank)
        ranks[best] = b.up(rank)


def _best_exchange(bidders: Sequence[Bidder], ranks: Sequence[int], left: int) -> tuple[int, int] | None:
    """The (taker, giver) of one step each whose exchange lowers the objective most, or None."""
    best, best_fall = None, 0.0
    for giver, (g, low) in enumerate(zip(bidders, ranks, strict=True)):
        if low == 1:
            continue
        loss, freed = g.gain(g.down(low), low), g.parameters(low) - g.parameters(g.down(low))
        for taker, (t, rank) in enumerate(zip(bidders, ranks, strict=True)):
            price = t.parameters(t.up(rank)) - t.parameters(rank)
            fall = t.gain(rank, t.up(rank)) - loss
            if taker != giver and rank < t.cap and price <= left + freed and fall > max(best_fall, 1e-12 * loss):
                best, best_fall = (taker, giver), fall
    return best
