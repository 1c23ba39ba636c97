"""The water level against exhaustive search, over linear (pair) and concave (pivoted) costs."""

from dataclasses import replace
from itertools import product
from math import inf

import pytest
import torch

from eckart import ledger
from eckart.allocators.water_level import WaterLevel
from eckart.checks import check_allocator, check_entries, problems_spectra
from eckart.errors import BudgetError, OptionError
from eckart.types import Budget, Group, Spectrum, Target

STORAGES = ("pair", "pivoted")


def small_spectra(seed, nats=None):
    """Four matrices of full rank 5 or 6, with unlike decays; few enough to try every combination."""
    generator = torch.Generator().manual_seed(seed)
    spectra = []
    for block, (rows, columns) in enumerate(((6, 6), (5, 9), (12, 6), (6, 8))):
        group = Group((Target(f"blocks.{block}.a", block, "a", rows, columns, False),))
        steps = torch.rand(group.full_rank, generator=generator, dtype=torch.float64) * (0.2 + 0.5 * block)
        spectra.append(Spectrum(group, torch.exp(-steps.cumsum(0)) * (1 + block), nats))
    return spectra


def total(spectra, entries):
    cost = sum(ledger.parameters(s.group, e.rank, e.storage) for s, e in zip(spectra, entries, strict=True))
    loss = sum(0.0 if e.rank is None else s.error(e.rank) ** 2 for s, e in zip(spectra, entries, strict=True))
    return cost, loss


def exhaustive(spectra, storage):
    """`(cost, loss)` of every combination of ranks and dense, sorted by cost."""
    options = []
    for s in spectra:
        ranks = [(ledger.parameters(s.group, r, storage), s.error(r) ** 2) for r in range(1, s.group.full_rank)]
        options.append([*ranks, (s.group.parameters, 0.0)])
    return [(sum(c for c, _ in choice), sum(x for _, x in choice)) for choice in product(*options)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_water_level_is_the_optimum_for_what_it_costs(storage, seed):
    """Every vertex is optimal at its own cost; between two vertices nothing beats the line through them."""
    spectra = small_spectra(seed)
    groups = [s.group for s in spectra]
    everything = exhaustive(spectra, storage)
    whole = sum(g.parameters for g in groups)
    equal = 0
    for allowed in range(int(0.35 * whole), whole):
        keep = (allowed + 0.5) / whole
        entries = WaterLevel().allocate(spectra, Budget(keep, storage=storage))
        cost, loss = total(spectra, entries)
        assert cost <= allowed
        best = min(x for c, x in everything if c <= allowed)
        assert loss <= 1.6 * best + 0.05  # a greedy use of what is left over; the bound is for tiny problems
        assert loss <= min((x for c, x in everything if c <= allowed - 30), default=inf)  # less than one step away
        equal += loss <= best * (1 + 1e-12)
    assert equal > 0.6 * (whole - int(0.35 * whole))


@pytest.mark.parametrize("storage", STORAGES)
def test_more_never_hurts(storage):
    losses = [
        total(problems_spectra(), WaterLevel().allocate(problems_spectra(), Budget(keep, storage=storage)))[1]
        for keep in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


class Stored:
    """The water level with another storage in every budget."""

    def __init__(self, storage, **options):
        self.storage, self.allocator = storage, WaterLevel(**options)

    def allocate(self, spectra, budget):
        return self.allocator.allocate(spectra, replace(budget, storage=self.storage))


@pytest.mark.parametrize(
    ("storage", "options"),
    [
        ("pivoted", {}),
        ("pair", {"dense": False}),
        ("pivoted", {"dense": False}),
        ("pair", {"normalise": True}),
        ("pair", {"floor_share": 0.1}),
    ],
)
def test_every_option_keeps_the_contract(storage, options):
    allocator = Stored(storage, **options)
    if options.get("dense", True):
        check_allocator(allocator)
        return
    spectra = problems_spectra()
    for keep in (0.4, 0.8):
        entries = allocator.allocate(spectra, Budget(keep))
        check_entries([s.group for s in spectra], entries, keep, 1)
        assert all(entry.rank is not None for entry in entries)


def test_the_budget_is_used_up():
    spectra = problems_spectra()
    for keep in (0.45, 0.6, 0.8, 0.93):
        spent = total(spectra, WaterLevel().allocate(spectra, Budget(keep, storage="pivoted")))[0]
        allowed = ledger.allowed_parameters([s.group for s in spectra], keep)
        assert allowed - spent < 32  # the cheapest further step costs up to m + n


def test_floors_and_multiples_are_part_of_the_problem():
    spectra = problems_spectra()
    entries = WaterLevel(floor_share=0.25, floor_rank=5).allocate(spectra, Budget(0.7, rank_multiple=4))
    for spectrum, entry in zip(spectra, entries, strict=True):
        if entry.rank is not None:
            assert entry.rank % 4 == 0
            assert entry.rank >= max(5, 0.25 * spectrum.group.full_rank)
    with pytest.raises(BudgetError, match=r"floor_share 0\.9 .* the smallest share is [01]\.\d+"):
        WaterLevel(floor_share=0.9).allocate(spectra, Budget(0.5))


def test_nats_decide_where_they_are_known():
    """A group whose errors do not matter for the loss gives up its rank."""
    spectra = problems_spectra()[:3:2]
    even = WaterLevel().allocate(spectra, Budget(0.5))
    weighed = [Spectrum(s.group, s.values, nats) for s, nats in zip(spectra, (1e-6, 1.0), strict=True)]
    assert WaterLevel(floor_share=0).allocate(weighed, Budget(0.5))[0].rank == 1
    assert even[0].rank is None or even[0].rank > 1
    one_unknown = [weighed[0], Spectrum(spectra[1].group, spectra[1].values)]
    assert WaterLevel().allocate(one_unknown, Budget(0.5)) == even


def test_scaling_one_group_changes_nothing_when_normalised():
    spectra = problems_spectra()
    scaled = [Spectrum(spectra[0].group, spectra[0].values / 100), *spectra[1:]]
    allocator = WaterLevel(normalise=True)
    assert allocator.allocate(scaled, Budget(0.6)) == allocator.allocate(spectra, Budget(0.6))
    assert WaterLevel().allocate(scaled, Budget(0.6)) != WaterLevel().allocate(spectra, Budget(0.6))


@pytest.mark.parametrize("options", [{"floor_rank": 0}, {"floor_share": 1.5}])
def test_impossible_floors_are_refused(options):
    with pytest.raises(OptionError, match=r"water_level\.floor"):
        WaterLevel(**options)


def test_equal_spectra_do_not_end_as_dense_ones_and_rank_one():
    """Where costs are concave the additive optimum is at the ends; the floor keeps every matrix alive."""
    spectra = [
        Spectrum(Group((Target(f"b.{i}.x", i, "x", 40, 40, False),)), torch.ones(40, dtype=torch.float64), 1.0)
        for i in range(4)
    ]
    ranks = [entry.rank for entry in WaterLevel().allocate(spectra, Budget(0.5, storage="pivoted"))]
    assert min(40 if rank is None else rank for rank in ranks) >= 2
    bare = [entry.rank for entry in WaterLevel(floor_share=0).allocate(spectra, Budget(0.5, storage="pivoted"))]
    assert 1 in bare


def test_a_full_budget_is_the_dense_model():
    """Also for a spectrum that is zero, which nothing could be lost of."""
    spectra = [Spectrum(s.group, torch.zeros_like(s.values), 1.0) for s in problems_spectra()[:2]]
    assert [entry.rank for entry in WaterLevel().allocate(spectra, Budget(1.0, storage="pivoted"))] == [None, None]
