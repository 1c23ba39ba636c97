"""D-Rank's ranks: densities, the Lagrange solution, the guard, and what the budget promises."""

import itertools
import logging
import math
from fractions import Fraction

import pytest
import torch

from eckart import ledger
from eckart.allocators.energy_effective_rank import EnergyEffectiveRank, auto_beta
from eckart.allocators.uniform import Uniform
from eckart.checks import check_entries
from eckart.errors import BudgetError, OptionError
from eckart.maths.density import effective_rank, energy_effective_rank, rank_at_95, stable_rank
from eckart.maths.lagrange import Bidder, closed_form, integer_ranks, total
from eckart.recipes import find
from eckart.types import Budget, Group, Spectrum, Target


def spectrum(kind, first_block, values, out=None, inner=None, members=1):
    """A spectrum of a group of `members` targets of one kind; square unless told otherwise."""
    values = torch.tensor(values, dtype=torch.float64)
    out, inner = out or len(values), inner or len(values)
    targets = [Target(f"b.{first_block + i}.{kind}", first_block + i, kind, out, inner, False) for i in range(members)]
    return Spectrum(Group(tuple(targets)), values)


def ranks(allocator, spectra, keep=0.5, multiple=1):
    return [entry.rank for entry in allocator.allocate(spectra, Budget(keep, multiple))]


# Densities of known spectra


@pytest.mark.parametrize("size", [1, 3, 20])
def test_a_flat_spectrum_has_the_density_of_its_length(size):
    values = torch.tensor([2.5] * size + [0.0] * 5)
    for measure in (energy_effective_rank, effective_rank, stable_rank):
        assert measure(values) == pytest.approx(size)
    assert rank_at_95(values) == math.ceil(0.95 * size)


def test_squares_and_values_give_different_ranks():
    values = torch.tensor([2.0, 1.0])  # energies .8 and .2, values 2/3 and 1/3
    assert energy_effective_rank(values) == pytest.approx(0.8**-0.8 * 0.2**-0.2)
    assert effective_rank(values) == pytest.approx((2 / 3) ** (-2 / 3) * (1 / 3) ** (-1 / 3))
    assert stable_rank(values) == pytest.approx(1.25)
    assert rank_at_95(values) == 2


def test_densities_do_not_change_with_the_scale_and_survive_zero():
    values = torch.rand(9, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    for measure in (energy_effective_rank, effective_rank, stable_rank, rank_at_95):
        assert measure(1e-9 * values.double()) == pytest.approx(measure(values.double()))
        assert measure(torch.zeros(4)) == 1


# The Lagrange solution


def test_the_closed_form_is_equation_7_and_a_stationary_point():
    bidders = [Bidder(r, w, 10**6) for r, w in ((100.0, 8), (40.0, 8), (7.0, 12))]
    found = closed_form(bidders, 5000)
    scale = 5000 / sum(math.sqrt(b.density * b.cost) for b in bidders)
    assert found == pytest.approx([scale * math.sqrt(b.density / b.cost) for b in bidders])
    assert sum(k * b.cost for k, b in zip(found, bidders, strict=True)) == pytest.approx(5000)
    slopes = [b.density / k**2 / b.cost for k, b in zip(found, bidders, strict=True)]
    assert slopes == pytest.approx([slopes[0]] * 3)


def brute_force(bidders, budget):
    """The least objective over every choice of whole ranks that the budget allows."""
    best = math.inf
    for choice in itertools.product(*(range(1, b.cap + 1) for b in bidders)):
        if sum(k * b.cost for k, b in zip(choice, bidders, strict=True)) <= budget:
            best = min(best, sum(b.density / k for k, b in zip(choice, bidders, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_whole_ranks_are_the_optimum_where_costs_are_equal(seed):
    generator = torch.Generator().manual_seed(seed)
    bidders = [
        Bidder(
            float(10 ** (3 * torch.rand((), generator=generator))),
            7,
            int(torch.randint(4, 13, (), generator=generator)),
        )
        for _ in range(4)
    ]
    budget = 7 * int(torch.randint(4, sum(b.cap for b in bidders) + 1, (), generator=generator)) + seed % 7
    found = integer_ranks(bidders, budget)
    assert total(bidders, found) == budget - seed % 7  # exact: nothing that could buy a rank is left
    assert sum(b.density / k for b, k in zip(bidders, found, strict=True)) == pytest.approx(
        brute_force(bidders, budget)
    )


@pytest.mark.parametrize("seed", range(25))
def test_whole_ranks_are_close_to_the_optimum_where_costs_differ(seed):
    generator = torch.Generator().manual_seed(seed)
    bidders = [Bidder(float(1 + 50 * torch.rand((), generator=generator)), cost, 12) for cost in (9, 9, 9, 5)]
    budget = int(torch.randint(120, 300, (), generator=generator))
    found = integer_ranks(bidders, budget)
    assert budget - min(b.cost for b in bidders) < total(bidders, found) <= budget
    reached = sum(b.density / k for b, k in zip(bidders, found, strict=True))
    assert reached <= 1.02 * brute_force(bidders, budget)


# The budget and the limit of equal densities


def model(blocks=6, seed=0, size=1):
    """Spectra of a small model with unlike shapes: grouped queries, tall and wide matrices, a smaller last group."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.q_proj": (24, 24), "a.k_proj": (8, 24), "a.v_proj": (8, 24), "a.o_proj": (24, 24),
              "m.gate_proj": (48, 24), "m.up_proj": (48, 24), "m.down_proj": (24, 48)}  # fmt: skip
    spectra = []
    for block in range(0, blocks, size):
        for kind, (out, inner) in shapes.items():
            members = min(size, blocks - block)
            full = min(out * members, inner)
            steps = torch.rand(full, generator=generator, dtype=torch.float64) * (0.02 + 0.1 * block)
            spectra.append(spectrum(kind, block, torch.exp(-steps.cumsum(0)).tolist(), out, inner, members))
    return spectra


OPTIONS = [
    {},
    {"beta": 0.0},
    {"beta": 0.9},
    {"guard": "multi_head"},
    {"guard": "every"},
    {"guard": "paper"},
    {"dense_cap": True},
    {"dense_cap": True, "beta": 0.9},
    {"dense_cap": True, "guard": "code", "beta": 0.2},
    {"measure": "stable_rank"},
    {"scope": "model", "guard": "paper"},
]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_never_over_budget_and_every_rank_possible(options, size):
    spectra = model(size=size)
    for keep in (0.4, 0.63, 0.8, 0.95, 1.0):
        for multiple in (1, 4):
            entries = EnergyEffectiveRank(**options).allocate(spectra, Budget(keep, multiple))
            check_entries([s.group for s in spectra], entries, keep, multiple)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_costs_what_uniform_ranks_cost(options):
    spectra = model()
    costs = [
        sum(ledger.parameters(s.group, e.rank) for s, e in zip(spectra, a.allocate(spectra, Budget(0.7)), strict=True))
        for a in (EnergyEffectiveRank(**options), Uniform())
    ]
    smallest_step = min(ledger.parameters(s.group, 1) for s in spectra)
    largest_step = max(ledger.parameters(s.group, 1) for s in spectra)
    assert costs[0] <= costs[1]
    slack = 7 * largest_step if options.get("dense_cap") else smallest_step
    assert costs[1] - costs[0] < slack


def test_equal_densities_give_the_ranks_of_svd_llm():
    values = [math.exp(-i / 9) for i in range(30)]
    spectra = [
        spectrum(kind, block, [v * (1 + block) for v in values], out, 30)
        for block in range(5)
        for kind, out in (("q_proj", 30), ("k_proj", 30), ("v_proj", 30), ("up_proj", 77))
    ]
    for keep in (0.5, 0.61, 0.8):
        mine = EnergyEffectiveRank(beta=0).allocate(spectra, Budget(keep))
        assert mine == Uniform().allocate(spectra, Budget(keep))


def test_ranks_follow_the_square_root_of_the_density():
    spectra = [spectrum("o_proj", b, [1.0] * flat + [0.0] * (400 - flat)) for b, flat in enumerate((25, 100, 225))]
    found = ranks(EnergyEffectiveRank(guard="paper"), spectra, keep=0.5)  # 100 each if uniform
    assert found == [50, 100, 150]


def test_kinds_do_not_trade_unless_they_may():
    flat, steep = [1.0] * 40, [1.0] + [0.0] * 39
    spectra = [spectrum("o_proj", 0, flat), spectrum("down_proj", 0, steep)]
    assert ranks(EnergyEffectiveRank(guard="paper"), spectra) == [10, 10]
    apart = ranks(EnergyEffectiveRank(scope="model", guard="paper"), spectra)
    assert sum(apart) == 20
    assert apart[0] > 15


def test_a_plan_names_the_density():
    entry = find("d-rank").make_allocator().allocate([spectrum("o_proj", 0, [1.0] * 8)], Budget(0.5))[0]
    assert entry.details == {"energy_effective_rank": 8.0, "guard": "uniform"}  # one group alone discards as much


# The guard, on examples worked out by hand: 8 x 8 matrices, a rank costs 16 of 64, so half is 2 ranks each.
# Densities 8 and 2: of the ways to spend 4 ranks, 8/3 + 2/1 = 4.67 beats 8/2 + 2/2 = 5 and 8/1 + 2/3 = 8.67.

WEAK = ([1.0] * 8, [10.0, 10.0] + [0.0] * 6)  # tails: 5 + 100 = 105 at (3, 1), 6 + 0 = 6 at (2, 2): uniform wins
STRONG = ([10.0] * 8, [1.0, 1.0] + [0.0] * 6)  # tails: 500 + 1 = 501 at (3, 1), 600 + 0 at (2, 2): dynamic wins


@pytest.mark.parametrize(
    ("guard", "kind", "pair", "expected"),
    [
        ("paper", "o_proj", WEAK, [3, 1]),
        ("paper", "gate_proj", WEAK, [3, 1]),
        ("multi_head", "o_proj", WEAK, [2, 2]),
        ("multi_head", "o_proj", STRONG, [3, 1]),
        ("multi_head", "down_proj", STRONG, [3, 1]),
        ("multi_head", "gate_proj", STRONG, [2, 2]),  # always uniform
        ("multi_head", "q_proj", WEAK, [3, 1]),  # never uniform
        ("multi_head", "k_proj", WEAK, [3, 1]),
        ("multi_head", "v_proj", WEAK, [3, 1]),
        ("multi_head", "attn.qkv_proj", WEAK, [3, 1]),
        ("grouped", "q_proj", STRONG, [2, 2]),  # always uniform, as keys and gate
        ("grouped", "k_proj", STRONG, [2, 2]),
        ("grouped", "gate_proj", STRONG, [2, 2]),
        ("grouped", "v_proj", STRONG, [3, 1]),
        ("grouped", "v_proj", WEAK, [2, 2]),
        ("grouped", "up_proj", STRONG, [3, 1]),
        ("every", "q_proj", WEAK, [2, 2]),
        ("every", "gate_proj", STRONG, [3, 1]),
    ],
)
def test_guard_by_hand(guard, kind, pair, expected):
    spectra = [spectrum(kind, block, values) for block, values in enumerate(pair)]
    entries = EnergyEffectiveRank(beta=0, guard=guard).allocate(spectra, Budget(0.5))
    assert [entry.rank for entry in entries] == expected
    assert all(("guard" in entry.details) == (expected == [2, 2]) for entry in entries)


def test_the_guard_judges_each_kind_by_itself():
    spectra = [
        spectrum(kind, b, v) for kind, pair in (("o_proj", WEAK), ("up_proj", STRONG)) for b, v in enumerate(pair)
    ]
    assert ranks(EnergyEffectiveRank(), spectra) == [2, 2, 3, 1]


# The released arithmetic on the shapes of models that their tables have. Source of the rule: the branch for grouped
# queries in the authors' repository Rainbow0427/D_rank (commented out there; LLaMA-3 and Mistral were run with it).
# Static ranks of queries, keys and gate, and of whatever would discard more energy; a share .1 of what queries and keys
# cost (8,192 and 5,120 parameters a rank) goes to the values, the same to each, up to 1,024; more than that goes to the
# smallest value matrix.

STEPS = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}


def flat(length, full):
    return [1.0] * length + [1e-9] * (full - length)


def test_the_ranks_of_llama_3_8b_by_the_authors_arithmetic():
    """Two layers at 0.8, effective ranks 1,024 and 256 of the values. Static: 1,638 and 655 (keys, values).

    Values by the density: 655 * 2 * (32, 16) / 48 = 873.3 and 436.7, and they discard less (151 against 369). What
    moves: .1 (1638 * 8192 + 655 * 5120) / 5120 = 327.6 ranks for each; 873.3 + 327.6 is over 1,024 by 176.9, which go
    to the other: 436.7 + 327.6 + 176.9 = 941.2. Queries keep 1638 * .9 = 1474.2, keys 589.5.
    """
    lengths = {"q_proj": (3000, 1000), "k_proj": (900, 300), "v_proj": (1024, 256), "gate_proj": (4096, 900)}
    shapes = {**STEPS, "gate_proj": (14336, 4096)}
    spectra = [
        spectrum(kind, block, flat(lengths[kind][block], min(shapes[kind])), *shapes[kind])
        for block in range(2)
        for kind in shapes
    ]
    found = ranks(EnergyEffectiveRank(), spectra, keep=0.8)
    q, k, v, gate = (found[i::4] for i in range(4))
    assert gate == [2548, 2548]
    assert v[0] == 1024
    assert v[1] == pytest.approx(941.2, abs=1.5)
    assert q == pytest.approx([1474.2] * 2, abs=1)
    assert k == pytest.approx([589.5] * 2, abs=1)
    assert auto_beta(0.8, [t for s in spectra for t in s.group.targets]) == Fraction(1, 10)


def test_the_ranks_of_mistral_7b_by_the_authors_arithmetic():
    """Queries of two layers share a basis there, keys and values have their own (`[C]` of the released configuration).

    A rank of the queries costs 4096 + 2 * 4096 = 12,288: static floor(.8 * 2 * 4096^2 / 12288) = 2184. Values of equal
    density stay at 655 before .1 (2184 * 12288 / 2 + 655 * 5120) / 5120 = 327.6 come: 982.6. Queries keep 1965.6.
    """
    spectra = [spectrum("q_proj", 0, flat(3000, 4096), 4096, 4096, members=2)]
    spectra += [spectrum(kind, b, flat(800, 1024), 1024, 4096) for b in range(2) for kind in ("k_proj", "v_proj")]
    q, *rest = ranks(EnergyEffectiveRank(), spectra, keep=0.8)
    assert q == pytest.approx(1965.6, abs=1)
    assert rest[0::2] == pytest.approx([589.5] * 2, abs=1)
    assert rest[1::2] == pytest.approx([982.6] * 2, abs=1.5)


def test_the_branch_is_chosen_by_shapes():
    """Keys as wide as queries are multi-head: queries stay dynamic. Narrower ones are grouped: queries are static."""
    for width, expected in ((8, [3, 1]), (4, [2, 2])):
        spectra = [spectrum("q_proj", block, values) for block, values in enumerate(STRONG)]
        spectra += [spectrum("k_proj", block, [1.0] * width, out=width, inner=8) for block in range(2)]
        assert ranks(EnergyEffectiveRank(beta=0), spectra)[:2] == expected


def test_values_are_never_given_more_ranks_than_one_layer_is_wide():
    """Groups of two with grouped queries: 16 values wide each, whose group has the full rank 32."""
    spectra = [spectrum(kind, 0, [1.0] * 48, 48, 48, members=2) for kind in ("q_proj", "k_proj")]
    spectra += [spectrum("v_proj", 0, [1.0] * 32, 16, 48, members=2)]
    entries = EnergyEffectiveRank(beta=0.5).allocate(spectra, Budget(0.8))
    assert entries[2].rank == 16
    assert ledger.parameters(spectra[2].group, entries[2].rank) <= spectra[2].group.parameters
    rank_before = entries[2].details["rank_before_rebalancing"]
    assert rank_before < 16


# Options and refusals


def test_auto_beta():
    targets = [spectrum(kind, 0, [1.0] * 8).group.targets[0] for kind in ("q_proj", "k_proj")]
    assert [float(auto_beta(keep, targets)) for keep in (0.9, 0.8, 0.7, 0.61, 0.6, 0.55, 0.5, 0.3)] == [
        0.3, 0.3, 0.3, 0.3, 0.35, 0.35, 0.4, 0.4,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"beta": "1.0"}, "beta is 1.0, but must be a number in [0, 1)"),
        ({"beta": "-0.1"}, "must be a number in [0, 1)"),
        ({"beta": "some"}, "beta is 'some'"),
        ({"guard": "none"}, "unknown value of energy_effective_rank.guard 'none'"),
        ({"guard": "code", "scope": "model"}, "the guard compares kind by kind"),
        ({"measure": "rank"}, "unknown value"),
    ],
)
def test_impossible_options(options, text):
    with pytest.raises(OptionError) as caught:
        find("d-rank", {f"allocator.{key}": value for key, value in options.items()})
    assert text in str(caught.value)


def test_a_kind_that_cannot_have_rank_1_is_named():
    spectra = [spectrum("k_proj", 0, [1.0, 1.0], out=2, inner=24), spectrum("o_proj", 0, [1.0] * 24)]
    with pytest.raises(BudgetError, match=r"b\.0\.k_proj needs 0\.5417 for rank 1"):
        EnergyEffectiveRank().allocate(spectra, Budget(0.4))


def test_fused_attention_is_not_rebalanced_and_says_so(caplog):
    spectra = [spectrum("attn.qkv_proj", b, [1.0] * 8, out=24, inner=8) for b in range(2)]
    with caplog.at_level(logging.WARNING):
        assert ranks(EnergyEffectiveRank(), spectra) == ranks(Uniform(), spectra)
    assert "nothing is rebalanced" in caplog.text
