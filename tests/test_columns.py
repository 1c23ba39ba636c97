"""Preserved columns, the maths, against direct computations. Float64."""

from itertools import product

import pytest
import torch

from eckart import ledger
from eckart.checks import gram_of
from eckart.errors import NumericalError, OptionError
from eckart.factorizers.column_preserving import ColumnDecomposition, ColumnPreserving
from eckart.factorizers.svd import SVD
from eckart.maths.columns import Splits, column_scores, kept_for, positive_definite, split
from eckart.maths.golden import golden_section
from eckart.recipes import find
from eckart.statistics.sums import GroupStatistics, Statistics
from eckart.types import Entry, Group, Target

Tensor = torch.Tensor
SHAPES = ((24, 40), (40, 24), (32, 32))


def problem(out_features: int, in_features: int, seed: int, outliers: int = 0) -> tuple[Tensor, Tensor]:
    """`(weight [out, in], inputs [tokens, in])` with correlated inputs and, at will, outlier channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(200, in_features) @ (torch.eye(in_features).double() + 0.4 * normal(in_features, in_features))
    if outliers:
        x[:, torch.randperm(in_features, generator=generator)[:outliers]] *= 30
    return normal(out_features, in_features), x


def decomposed(weight: Tensor, x: Tensor, **options: object) -> ColumnDecomposition:
    group = Group((Target("0", 0, "0", *weight.shape, False),))
    statistics = GroupStatistics((Statistics(tokens=len(x), input_gram=gram_of(x)),))
    made = ColumnPreserving(damping=1e-10, **options).decompose(group, [weight], statistics)  # type: ignore[arg-type]
    assert isinstance(made, ColumnDecomposition)
    return made


def output_error(weight: Tensor, replacement: Tensor, x: Tensor) -> float:
    return float(((weight - replacement) @ x.T).norm())


@pytest.mark.parametrize(("out_features", "in_features"), [(24, 40), (40, 24), (4096, 11008), (11008, 4096)])
def test_exchange_spends_what_the_pair_spends_but_never_more(out_features: int, in_features: int) -> None:
    group = Group((Target("0", 0, "0", out_features, in_features, False),))
    for rank in {2, 9, int(0.4 * group.full_rank), ledger.largest_rank(group, group.parameters) - 1}:
        pair = ledger.parameters(group, rank)
        for given_up in range(0, rank, max(1, rank // 50)):
            kept = kept_for(given_up, rank, out_features, in_features)
            spent = ledger.parameters(group, rank - given_up, "columns", kept)
            assert spent <= pair
            if kept < in_features - (rank - given_up):  # not stopped by the width
                assert pair - spent < out_features - (rank - given_up), "one more column would have fitted"


def test_score_is_what_a_column_does_to_the_output() -> None:
    weight, x = problem(24, 40, 0)
    residual = torch.randn_like(weight)
    direct = torch.stack([(residual[:, j : j + 1] @ x[:, j : j + 1].T).square().sum() for j in range(40)])
    torch.testing.assert_close(column_scores(residual, x.T @ x), direct, rtol=1e-10, atol=0)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_a_split_is_what_its_factors_do_to_the_output(shape: tuple[int, int], compensated: bool) -> None:
    weight, x = problem(*shape, seed=1)
    gram = x.T @ x
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    splits = Splits(weight, gram, order, compensated)
    for rank, kept in product((1, 5, 11), (0, 1, 6, shape[1] - 11)):
        made = split(weight, gram, order[:kept], rank, compensated)
        assert made.kept_index.tolist() == sorted(order[:kept].tolist())
        replacement = torch.empty_like(weight)
        rest = [j for j in range(shape[1]) if j not in made.kept_index.tolist()]
        replacement[:, rest], replacement[:, made.kept_index] = made.coefficients @ made.basis, made.kept
        if not compensated:
            assert torch.equal(made.kept, weight[:, made.kept_index])
        direct = output_error(weight, replacement, x)
        whole = output_error(weight, torch.zeros_like(weight), x) ** 2
        assert splits.squared_error(rank, kept) == pytest.approx(direct**2, rel=1e-9, abs=1e-12 * whole)


def test_compensated_split_is_the_least_squares_optimum() -> None:
    """Alternating least squares over both parts, from many starts, does not find a better one, and comes near."""
    weight, x = problem(10, 12, seed=3)
    gram, kept, rank = x.T @ x, torch.tensor([2, 7]), 3
    rest = [j for j in range(12) if j not in kept.tolist()]
    ours = Splits(weight, gram, torch.tensor([2, 7, *rest]), True).squared_error(rank, 2)
    outputs, found = x @ weight.T, []
    for seed in range(5):
        basis = torch.randn(rank, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for _ in range(300):
            inputs = torch.cat([x[:, rest] @ basis.T, x[:, kept]], dim=1)
            solution = torch.linalg.lstsq(inputs, outputs).solution  # [rank + kept, out]
            target = outputs - x[:, kept] @ solution[rank:]
            left = torch.linalg.lstsq(x[:, rest], target).solution  # [in - kept, out]
            basis = torch.linalg.lstsq(solution[:rank].T, left.T).solution
        found.append(float((outputs - inputs @ solution).square().sum()))
    assert ours <= min(found) * (1 + 1e-9)
    assert ours == pytest.approx(min(found), rel=1e-4)


def test_compensated_is_never_worse_than_faithful() -> None:
    for seed in range(100):
        shape = SHAPES[seed % 3]
        weight, x = problem(*shape, seed=seed)
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
        gram = x.T @ x
        pair = [Splits(weight, gram, order, compensated) for compensated in (True, False)]
        rank, kept = 2 + seed % 9, 1 + seed % 13
        better, faithful = (splits.squared_error(rank, kept) for splits in pair)
        assert better <= faithful * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "median"), [((60, 80), 0.65), ((64, 64), 0.65), ((80, 60), 0.8)])
def test_compensated_is_better_with_outlier_channels(shape: tuple[int, int], median: float) -> None:
    """Where the faithful search finds no split at all; clearly so unless the matrix is tall."""
    gains = []
    for seed in range(10):
        weight, x = problem(*shape, seed=seed, outliers=6)
        errors = []
        for compensated in (True, False):
            made = decomposed(weight, x, compensated=compensated)
            entry = made.settle(Entry(("0",), 20))
            assert entry.rank is not None
            errors.append(output_error(weight, made.truncate(entry.rank, entry.kept).product(), x) ** 2)
        gains.append(errors[0] / errors[1])
    print("squared error, compensated / faithful:", [round(gain, 3) for gain in gains])
    assert max(gains) <= 1 + 1e-9
    assert sorted(gains)[5] < median


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("early_exit", [False, True])
def test_search_against_every_split(compensated: bool, early_exit: bool) -> None:
    """The search comes within 1 % of the best split, and never behind no split at all.

    In 59 of 60 cases for the faithful variant, 55 for the compensated one, whose error has several valleys,
    and never more than 5 % above it.
    With the early exit it may also stop at no split although one is better: that is the published rule.
    """
    near, missed = 0, 0
    for seed in range(60):
        shape = SHAPES[seed % 3]
        weight, x = problem(*shape, seed=seed, outliers=seed % 7)
        made = decomposed(weight, x, compensated=compensated, early_exit=early_exit)
        rank = 5 + seed % 8
        splits = made._splits(rank)
        every = [splits.squared_error(rank - d, kept_for(d, rank, *shape)) ** 0.5 for d in range(rank)]
        entry = made.settle(Entry(("0",), rank))
        assert entry.rank is not None
        assert entry.kept is not None
        found = splits.squared_error(entry.rank, entry.kept) ** 0.5
        assert found <= every[0] * (1 + 1e-9)
        assert ledger.parameters(made.group, entry.rank, entry.storage, entry.kept) <= ledger.parameters(
            made.group, rank
        )
        probes = [every[round(0.382 * rank)], every[round(0.618 * 0.146 * rank)]]
        if early_exit and entry.kept == 0 and min(probes) >= every[0]:
            missed += min(every) < 0.99 * every[0]
            continue
        near += found <= 1.01 * min(every)
        assert found <= 1.05 * min(every)
        if found > 1.01 * min(every):
            print(seed, "found", found, "best", min(every))
    print("missed by the early exit:", missed)
    assert near >= (0 if early_exit else 55 if compensated else 59)


def test_a_replayed_split_keeps_the_same_columns() -> None:
    for seed in range(20):
        weight, x = problem(40, 24, seed, outliers=3)
        made = decomposed(weight, x, early_exit=False, acceptance=0.0)
        entry = made.settle(Entry(("0",), 6 + seed % 5))
        assert entry.rank is not None
        assert made._plain_rank(entry.rank, entry.kept or 0) == 6 + seed % 5
        again = decomposed(weight, x, early_exit=False, acceptance=0.0)
        assert again.settle(entry) == entry
        first, second = made.truncate(entry.rank, entry.kept), again.truncate(entry.rank, entry.kept)
        assert torch.equal(first.product(), second.product())


def test_zero_columns_is_the_plain_pair() -> None:
    weight, x = problem(24, 40, 0)
    made = decomposed(weight, x)
    assert made.settle(Entry(("0",), 9, kept=0)) == Entry(("0",), 9, kept=0)
    assert made.truncate(9, 0).kept_index is None
    assert made.settle(Entry(("0",), None)) == Entry(("0",), None)


@pytest.mark.parametrize("lowest", [0, 1, 17, 50, 98, 99])
def test_golden_section_finds_the_lowest_point(lowest: int) -> None:
    asked: set[int] = set()

    def value(point: int) -> float:
        asked.add(point)
        return abs(point - lowest)

    assert golden_section(0, 99, value) == lowest
    assert len(asked) <= 14


def test_a_gram_that_rounding_spoilt_still_serves() -> None:
    weight, x = problem(24, 40, 0)
    low = x[:, :5] @ x[:5, :40]  # rank 5
    gram = (low.float().T @ low.float()).double()
    assert int(torch.linalg.cholesky_ex(gram).info) != 0
    mended = positive_definite(gram)
    assert float((mended - gram).norm()) < 1e-4 * float(gram.norm())
    assert Splits(weight, mended, torch.arange(40), True).squared_error(3, 4) >= 0
    assert positive_definite(mended) is mended


def test_a_gram_that_nothing_mends_is_named() -> None:
    group = Group((Target("blocks.0.q", 0, "q", 4, 6, False),))
    plain = SVD().decompose(group, [torch.eye(4, 6).double()], GroupStatistics((Statistics(),)))
    made = ColumnDecomposition(ColumnPreserving(), plain, -torch.eye(6).double())
    with pytest.raises(NumericalError, match=r"^blocks\.0\.q: its input Gram is not positive definite\.$"):
        made.settle(Entry(("blocks.0.q",), 3))


def test_an_acceptance_is_a_share() -> None:
    with pytest.raises(OptionError, match=r"^column_preserving\.acceptance is 1, but must lie in \[0, 1\)\.$"):
        find("svd-llm", {"factorizer": "column_preserving", "factorizer.acceptance": 1})
