"""Ranks of queries and keys that go to the values: the published arithmetic, the caps, the overflow."""

from fractions import Fraction

import pytest

from eckart.ledger import largest_rank, parameters, share
from eckart.maths.lagrange import Bidder, total
from eckart.maths.rebalance import rebalance_
from eckart.types import Group, Target

LLAMA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096)}
LLAMA_3_8B = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096)}


def rebalanced(shapes, keep, beta, members=1, blocks=32, dense_cap=False, v_ranks=None):
    """Uniform ranks of every group, rebalanced: (bidders, ranks before, ranks after), q then k then v."""
    bidders, before = [], []
    for out, inner in shapes.values():
        for first in range(0, blocks, members):
            size = min(members, blocks - first)
            group = Group(tuple(Target(f"{first + i}", first + i, "x", out, inner, False) for i in range(size)))
            cost, dense = parameters(group, 1), group.parameters
            bidders.append(
                Bidder(1.0, cost, -(-dense // cost), dense) if dense_cap else Bidder(1.0, cost, group.full_rank)
            )
            before.append(largest_rank(group, share(keep) * dense))
    third = len(before) // 3
    if v_ranks is not None:
        before[2 * third :] = v_ranks
    after = list(before)
    givers, takers = list(range(2 * third)), list(range(2 * third, 3 * third))
    rebalance_(bidders, after, givers, takers, Fraction(str(beta)))
    return bidders, before, after


@pytest.mark.parametrize(
    ("keep", "beta", "qk", "v", "of_break_even"),
    [  # methods 1(f): mean V rank and V's cost by its dense cost, 2731 being the break-even of a pair of layers
        (0.8, 0.30, 1529, 3494, 1.28),
        (0.7, 0.30, 1338, 3057, 1.12),
        (0.6, 0.35, 1065, 2784, 1.02),
        (0.5, 0.40, 819, 2457, 0.90),
    ],
)
def test_multi_head_attention_moves_ranks(keep, beta, qk, v, of_break_even):
    _, before, after = rebalanced(LLAMA_7B, keep, beta, members=2)
    assert set(after[:32]) == {qk}
    assert set(after[32:]) == {v}
    assert sum(after) == sum(before)
    assert v / (4096 * 8192 / 12288) == pytest.approx(of_break_even, abs=0.01)


def test_grouped_queries_move_parameters():
    bidders, before, after = rebalanced(LLAMA_3_8B, 0.8, 0.1)
    assert (before[0], before[32], before[64]) == (1638, 655, 655)
    assert set(after[:32]) == {1638 - 164}
    assert set(after[32:64]) == {655 - 66}
    # (164 * 8192 + 66 * 5120) / 5120 = 328.4 ranks for each V; the 0.4 of 32 groups make 12 ranks more.
    assert sorted(after[64:]) == [983] * 20 + [984] * 12
    assert total(bidders, before) - total(bidders, after) < 5120


def test_dense_cap_leaves_v_dense_and_lifts_q_and_k():
    """Methods 1(f): at 20 % and beta .30 the excess lifts q and k from 1529 to about 1911."""
    bidders, before, after = rebalanced(LLAMA_7B, 0.8, 0.3, members=2, dense_cap=True)
    assert all(rank == b.cap for rank, b in zip(after[32:], bidders[32:], strict=True))
    assert set(after[:32]) <= {1910, 1911}
    assert 0 <= total(bidders, before) - total(bidders, after) < 12288


def test_v_is_capped_and_the_overflow_is_refunded():
    bidders, before, after = rebalanced(LLAMA_3_8B, 0.8, 0.3)
    assert set(after[64:]) == {1024}
    assert set(after[:32]) != {1638 - 491}  # more than what is left without a refund
    assert total(bidders, before) - total(bidders, after) < 5120
    paid = [(b - a) * bidder.cost for b, a, bidder in zip(before[:64], after[:64], bidders[:64], strict=True)]
    offered = [491 * 8192] * 32 + [196 * 5120] * 32
    shares = [p / o for p, o in zip(paid, offered, strict=True)]
    assert max(shares) - min(shares) < 0.01  # pro rata, up to a rank


def test_overflow_goes_first_to_the_smallest_v():
    """Cost 2, caps 10. Q and K give 3 of 6 each, so 3 to each V: 9 can take but 1, 2 becomes 5, then 7."""
    bidders = [Bidder(1.0, 2, 10)] * 4
    ranks = [6, 6, 9, 2]
    rebalance_(bidders, ranks, [0, 1], [2, 3], Fraction(1, 2))
    assert ranks == [3, 3, 10, 7]


def test_refund_by_hand():
    """Q gives 4, K gives 2, V has room for 3 in all: 3 go back, 2 to Q and 1 to K."""
    bidders = [Bidder(1.0, 2, 10)] * 4
    ranks = [8, 4, 9, 8]
    rebalance_(bidders, ranks, [0, 1], [2, 3], Fraction(1, 2))
    assert ranks == [6, 3, 10, 10]


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.4, 0.99])
@pytest.mark.parametrize("members", [1, 3, 5])
@pytest.mark.parametrize("shapes", [LLAMA_7B, LLAMA_3_8B], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("dense_cap", [False, True])
def test_what_moves_is_conserved(beta, members, shapes, dense_cap):
    """A last group that is smaller is part of it: 32 blocks in threes or fives."""
    bidders, before, after = rebalanced(shapes, 0.7, beta, members, dense_cap=dense_cap)
    lost = total(bidders, before) - total(bidders, after)
    assert 0 <= lost < max(b.cost for b in bidders)
    assert all(1 <= rank <= b.cap for rank, b in zip(after, bidders, strict=True))
    third = len(after) // 3
    assert all(a >= b for a, b in zip(after[2 * third :], before[2 * third :], strict=True))
    assert all(a <= b for a, b in zip(after[: 2 * third], before[: 2 * third], strict=True))
