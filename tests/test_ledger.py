"""Parameter counts against hand-counted and published values."""

import pytest

from eckart import ledger
from eckart.errors import BudgetError, PlanError
from eckart.types import Entry, Group, Target


def group(out, inner, members=1):
    return Group(tuple(Target(f"m{i}", i, "k", out, inner, True) for i in range(members)))


@pytest.mark.parametrize(
    ("out", "inner", "keep", "rank"),
    [
        (4096, 4096, 0.8, 1638), (4096, 4096, 0.7, 1433), (4096, 4096, 0.6, 1228), (4096, 4096, 0.5, 1024),
        (11008, 4096, 0.8, 2388), (11008, 4096, 0.7, 2089), (11008, 4096, 0.6, 1791), (11008, 4096, 0.5, 1492),
        (1024, 4096, 0.8, 655), (1024, 4096, 0.7, 573), (1024, 4096, 0.6, 491),
        (14336, 4096, 0.8, 2548), (14336, 4096, 0.7, 2230), (14336, 4096, 0.6, 1911),
    ],
)  # fmt: skip
def test_uniform_ranks_of_methods_0_2(out, inner, keep, rank):
    one = group(out, inner)
    assert ledger.largest_rank(one, ledger.share(keep) * one.parameters) == rank


@pytest.mark.parametrize(
    ("out", "keep", "ranks"),
    [
        (4096, 0.8, [1638, 2184, 2457, 2621]),
        (4096, 0.7, [1433, 1911, 2150, 2293]),
        (4096, 0.6, [1228, 1638, 1843, 1966]),
        (11008, 0.8, [2388, 2762, 2915, 2997]),
    ],
)
def test_shared_basis_ranks_of_methods_0_2(out, keep, ranks):
    for members, rank in enumerate(ranks, 1):
        shared = group(out, 4096, members)
        assert ledger.largest_rank(shared, ledger.share(keep) * shared.parameters) == rank


def test_share_is_the_decimal_that_was_written():
    # 0.7 in binary is below 7/10: floor(0.7 * 10) would be 7 by luck, 0.29 * 100 would be 28.
    assert ledger.allowed_parameters([group(10, 10)], 0.29) == 29


def test_a_shared_basis_is_counted_once():
    assert ledger.parameters(group(6, 10, members=3), 4) == 4 * 10 + 3 * 6 * 4


def test_ledger_adds_up_and_keeps_the_rest_of_the_model():
    groups = [group(8, 8), Group((Target("n", 0, "k", 4, 8, False),))]
    entries = [Entry(("m0",), 2), Entry(("n",), None)]
    made = ledger.make_ledger(groups, entries, model_parameters=200, bytes_each=2)
    assert (made.target_parameters_dense, made.target_parameters_kept) == (96, 32 + 32)
    assert (made.model_parameters_kept, made.model_bytes_kept) == (200 - 32, 2 * 168)
    assert made.keep == pytest.approx(64 / 96)
    assert made.keep_model == pytest.approx(168 / 200)
    with pytest.raises(BudgetError, match=r"keeps 64 parameters, but keep 0\.5 allows 48"):
        ledger.assert_within(made, 0.5)


@pytest.mark.parametrize("keep", [0, -1, 1.2, float("nan")])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(BudgetError, match=r"must lie in \(0, 1\]"):
        ledger.check_reachable([group(8, 8)], keep)


def test_unreachable_keep_names_the_reachable_range():
    with pytest.raises(BudgetError, match=r"smallest reachable share is 0\.2500 .*\[0\.2500, 1\]"):
        ledger.check_reachable([group(8, 8)], 0.2)


def test_unknown_storage_is_refused():
    with pytest.raises(PlanError, match=r"m0: storage 'zip' is unknown\. Known: columns, packed, packed_pair, "):
        ledger.parameters(group(8, 8), 2, "zip")
