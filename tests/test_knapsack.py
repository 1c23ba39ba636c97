"""The knapsack against enumeration, its budget, and the release's overshoot."""

from itertools import product

import pytest
import torch

from eckart import ledger
from eckart.allocators import knapsack
from eckart.allocators.knapsack import Choice, Knapsack, exact
from eckart.errors import BudgetError, OptionError
from eckart.maths.curve_fit import filled, fit, never_rising
from eckart.types import Budget, Group, Spectrum, Target

SHARES = tuple(step / 10 for step in range(1, 11))


def spectrum(block: int, rows: int, columns: int, generator: torch.Generator) -> Spectrum:
    """A group with a synthetic sensitivity that falls with the share like `a (s^-p - 1)`."""
    group = Group((Target(f"{block}.{rows}", block, "linear", rows, columns, False),))
    scale, power = torch.rand(2, generator=generator).tolist()
    # Bounded by 2^30 / 10 values nobody reads: the knapsack goes by what was observed alone.
    values = torch.zeros(1, dtype=torch.float64)
    measured = {s: (0.1 + scale) * (s ** -(0.5 + 2 * power) - 1) for s in (*SHARES, 0.77)}
    return Spectrum(group, values, observed={"sensitivity": measured})


def spent(spectra: list[Spectrum], allocator: Knapsack, keep: float) -> tuple[int, float]:
    entries = allocator.allocate(spectra, Budget(keep))
    groups = [s.group for s in spectra]
    return sum(ledger.parameters(g, e.rank) for g, e in zip(groups, entries, strict=True)), sum(
        g.parameters for g in groups
    )


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 0.8])
def test_equal_to_enumeration_on_five_modules(seed: int, keep: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [
        spectrum(i, *shape, generator) for i, shape in enumerate([(64, 64), (64, 48), (96, 64), (17, 64), (64, 96)])
    ]
    allocator = Knapsack()
    choices = [allocator._choices(s, Budget(keep)) for s in spectra]
    allowed = ledger.allowed_parameters([s.group for s in spectra], keep)
    best = min(
        sum(choice.loss for choice in combination)
        for combination in product(*choices)
        if sum(choice.cost for choice in combination) <= allowed
    )
    picked = exact(choices, allowed)
    chosen = [options[p] for options, p in zip(choices, picked, strict=True)]
    assert sum(choice.cost for choice in chosen) <= allowed
    assert sum(choice.loss for choice in chosen) == pytest.approx(best, rel=1e-12)


def test_a_choice_that_fits_exactly_is_taken_and_one_number_less_rules_it_out() -> None:
    only = spectrum(0, 64, 64, torch.Generator().manual_seed(0))
    rank = 20
    cost, dense = ledger.parameters(only.group, rank), only.group.parameters
    shares = (0.1, cost / dense)
    curves = {share: 1 / share for share in (*shares, (cost - 1) / dense)}
    for allowed, found in ((cost, rank), (cost - 1, 19)):
        measured = Spectrum(only.group, only.values, observed={"sensitivity": curves})
        entries = Knapsack(shares=shares).allocate([measured], Budget(allowed / dense))
        assert entries[0].rank == found


def test_coarse_table_stays_within_the_budget_and_near_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = [spectrum(i, 64 + 7 * (i % 3), 64, generator) for i in range(40)]
    choices = [Knapsack()._choices(s, Budget(0.6)) for s in spectra]
    allowed = ledger.allowed_parameters([s.group for s in spectra], 0.6)

    def loss_and_cost() -> tuple[float, int]:
        chosen = [options[p] for options, p in zip(choices, exact(choices, allowed), strict=True)]
        return sum(c.loss for c in chosen), sum(c.cost for c in chosen)

    best, cost = loss_and_cost()
    monkeypatch.setattr(knapsack, "STATES", 4000)
    coarse, coarse_cost = loss_and_cost()
    assert max(cost, coarse_cost) <= allowed
    assert best <= coarse <= best * 1.02


def llama_2_7b(generator: torch.Generator) -> list[Spectrum]:
    kinds = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    return [spectrum(block, *shape, generator) for block in range(32) for shape in kinds]


def llama_3_8b(generator: torch.Generator) -> list[Spectrum]:
    kinds = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    return [spectrum(block, *shape, generator) for block in range(32) for shape in kinds]


@pytest.mark.parametrize(
    ("model", "keep", "reached"),
    [(llama_2_7b, 0.8, 0.817), (llama_2_7b, 0.9, 0.917), (llama_2_7b, 0.7, 0.717), (llama_3_8b, 0.8, 0.809)],
)
def test_published_budget_overshoots_as_the_release_does(model, keep, reached) -> None:  # type: ignore[no-untyped-def]
    spectra = model(torch.Generator().manual_seed(0))
    kept, total = spent(spectra, Knapsack(budget="published"), keep)
    print(f"{model.__name__} keep {keep}: published reaches {kept / total:.4f}")
    assert kept / total == pytest.approx(reached, abs=0.003)
    within, _ = spent(spectra, Knapsack(), keep)
    print(f"  exact reaches {within / total:.5f}")
    assert keep - 0.001 < within / total <= keep


def test_rank_multiple_is_a_constraint_of_the_choice() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = [spectrum(i, 64, 64, generator) for i in range(6)]
    entries = Knapsack().allocate(spectra, Budget(0.6, 8))
    assert all(entry.rank is None or entry.rank % 8 == 0 or entry.rank < 8 for entry in entries)


def test_only_published_may_exceed() -> None:
    assert not Knapsack().may_exceed
    assert Knapsack(budget="published").may_exceed


def test_without_curves_it_says_so() -> None:
    plain = Spectrum(Group((Target("0", 0, "linear", 8, 8, False),)), torch.ones(8).double())
    with pytest.raises(OptionError, match="needs measured curves"):
        Knapsack().allocate([plain], Budget(0.8))


def test_a_budget_below_the_cheapest_candidates_is_refused() -> None:
    with pytest.raises(BudgetError, match="the cheapest candidates need 10 parameters, but the budget allows 9"):
        exact([[Choice(1, 10, 0.0)]], 9)


@pytest.mark.parametrize("shares", [("a",), (1.2,), (0.0,)])
def test_shares_that_cannot_be_are_refused(shares) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=r"knapsack\.shares"):
        Knapsack(shares=shares)


@pytest.mark.parametrize("measured", [(0.5,), (1.0,), (0.4, 0.6)])
def test_measured_shares_that_make_no_curve_are_refused_before_anything_is_measured(measured) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=r"knapsack\.measured is .* needs 1 and one more"):
        Knapsack(measured=measured)


def test_a_share_that_no_curve_gives_is_named() -> None:
    group, curve = Group((Target("0", 0, "linear", 8, 8, False),)), {0.5: 1.0, 1.0: 0.0}
    thin = Spectrum(group, torch.ones(8).double(), observed={"sensitivity": curve})
    with pytest.raises(OptionError, match=r"0: the share 0\.1 was not measured"):
        Knapsack(measured=(0.5, 1.0)).allocate([thin], Budget(0.5))


def test_a_power_law_is_found_again_from_three_points() -> None:
    curve = {share: 3 + 0.2 * (share**-1.5 - 1) for share in SHARES}
    few = {share: curve[share] for share in (0.4, 0.8, 1.0)}
    assert fit(few) == (pytest.approx(0.2, rel=1e-6), pytest.approx(1.5))
    assert filled(few, SHARES) == pytest.approx(curve)
    assert filled({0.5: 1.0}, SHARES) == {0.5: 1.0}


def with_curve(spectrum: Spectrum, curve: dict[float, float], values: torch.Tensor) -> Spectrum:
    return Spectrum(spectrum.group, values, observed={"sensitivity": curve})


def test_the_budget_is_spent_where_measured_curves_are_flat_or_noisy() -> None:
    """What was measured around 0.9 sees no use for more than half, and says at random that more is worse."""
    generator = torch.Generator().manual_seed(3)
    spectra = []
    for block in range(6):
        group = spectrum(block, 64, 48, generator)
        noise = (0.01 * torch.randn(len(SHARES) + 1, generator=generator)).tolist()
        curve = {share: max(0.5 - share, 0.0) + n for share, n in zip((*SHARES, 0.77), noise, strict=True)}
        spectra.append(with_curve(group, curve, torch.rand(48, generator=generator).sort(descending=True).values))
    for keep in (0.77, 0.9):
        kept, total = spent(spectra, Knapsack(), keep)
        largest_step = max(s.group.out_features + s.group.in_features for s in spectra)
        assert keep * total - largest_step < kept <= keep * total


def test_what_is_left_goes_where_the_discarded_energy_falls_most() -> None:
    """Two groups of one curve, flat: the one whose spectrum is steep needs nothing more."""
    generator = torch.Generator().manual_seed(0)
    flat, steep = torch.ones(64), torch.cat([torch.ones(6), 1e-3 * torch.ones(58)])
    spectra = [
        with_curve(spectrum(block, 64, 64, generator), dict.fromkeys(SHARES, 0.0), values)
        for block, values in enumerate((flat, steep))
    ]
    entries = Knapsack().allocate(spectra, Budget(0.5))
    ranks = [64 if entry.rank is None else entry.rank for entry in entries]
    assert ranks[0] > 20
    assert ranks[1] <= 6


@pytest.mark.parametrize("seed", range(20))
def test_curves_that_never_rise_are_the_nearest_ones(seed: int) -> None:
    """Against the min-max formula of isotonic regression, which pools nothing."""
    losses = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = [min(max(float(losses[a : b + 1].mean()) for b in range(i, 9)) for a in range(i + 1)) for i in range(9)]
    assert never_rising(losses.tolist()) == pytest.approx(expected)
