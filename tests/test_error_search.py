"""The rank search: exact budgets, one seed one plan, never worse than uniform, resumable."""

import pytest
import torch

import eckart
from eckart import ledger
from eckart.allocators._share_candidates import NARROW, draw_removal, draws, fit_ranks, mean_removed
from eckart.allocators.error_search import ErrorSearch, discarded_energy
from eckart.allocators.uniform import Uniform
from eckart.checks import check_entries, problems_spectra
from eckart.errors import DataError, NumericalError, OptionError
from eckart.measuring.probes import split_for_search
from eckart.recipes import Recipe
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.types import Budget

TEXT = "Candidates are drawn from a prior, and uniform is always one of them. " * 60


class Watched:
    """A probe whose held-out losses disagree a little with its scores; remembers what it was asked."""

    def __init__(self, spectra, wobble=0.0):
        self.spectra, self.wobble, self.asked = spectra, wobble, []

    def __call__(self, entries, held_out=False):
        ranks = tuple(entry.rank for entry in entries)
        self.asked.append((ranks, held_out))
        noise = self.wobble * (hash(ranks) % 1000 / 1000) if held_out else 0.0
        return 3.0 + discarded_energy(self.spectra, entries) + noise


@pytest.mark.parametrize("per", ["block", "kind"])
@pytest.mark.parametrize("keep", [0.35, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_candidate_is_within_one_step_of_the_budget(per, keep, multiple):
    spectra = problems_spectra()
    groups = [spectrum.group for spectrum in spectra]
    search, probe = ErrorSearch(per=per, candidates=30), Watched(spectra)
    units = search.units(spectra)
    made = search.sample(
        spectra, Budget(keep, multiple), units, search.sensitivities(spectra, Budget(keep, multiple), units, probe)
    )
    assert len(made) == 29
    allowed = ledger.allowed_parameters(groups, keep)
    for entries in made:
        check_entries(groups, entries, keep, multiple)
        spent = sum(ledger.parameters(g, e.rank) for g, e in zip(groups, entries, strict=True))
        room = [
            g for g, e in zip(groups, entries, strict=True) if e.rank + multiple <= g.full_rank // multiple * multiple
        ]
        assert all(multiple * ledger.parameters(g, 1) > allowed - spent for g in room)
    if multiple == 1 and keep == 0.6:  # tiny matrices have few ranks to choose from
        assert len({tuple(e.rank for e in entries) for entries in made}) > 10


def test_same_seed_same_plan_other_seed_other_candidates():
    spectra = problems_spectra()
    plans = [ErrorSearch(seed=seed).search(spectra, Budget(0.6), Watched(spectra)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert draws(5, 3, 1.2, 0.15, 0) == draws(5, 3, 1.2, 0.15, 0) != draws(5, 3, 1.2, 0.15, 1)


@pytest.mark.parametrize("wobble", [0.0, 5.0])
def test_uniform_is_scored_and_the_choice_is_never_worse(wobble):
    spectra = problems_spectra()
    for seed in range(5):
        probe = Watched(spectra, wobble)
        chosen = ErrorSearch(candidates=12, seed=seed).search(spectra, Budget(0.6), probe)
        uniform = Uniform().allocate(spectra, Budget(0.6))
        ranks = tuple(entry.rank for entry in uniform)
        assert (ranks, False) in probe.asked
        assert (ranks, True) in probe.asked
        assert probe(chosen) <= probe(uniform)
        assert probe(chosen, held_out=True) <= probe(uniform, held_out=True)
        assert len([1 for _, held_out in probe.asked if held_out]) <= 4 + 1 + 2


def test_uniform_wins_where_everything_else_is_worse():
    """A probe that punishes every distance from uniform."""
    spectra = problems_spectra()
    uniform = Uniform().allocate(spectra, Budget(0.6))

    def probe(entries, held_out=False):
        if any(entry.rank is None for entry in entries):
            return 1.0
        return 1.0 + sum(abs(a.rank - b.rank) for a, b in zip(entries, uniform, strict=True))

    chosen = ErrorSearch().search(spectra, Budget(0.6), probe)
    assert [entry.rank for entry in chosen] == [entry.rank for entry in uniform]
    assert chosen[0].details["search"]["chosen"] == 0


def test_sensitive_blocks_keep_more():
    spectra = problems_spectra()

    def probe(entries, held_out=False):
        weights = {0: 9.0, 1: 1.0, 2: 1.0, 3: 1.0}
        return sum(
            weights[s.group.targets[0].block] * discarded_energy([s], [e])
            for s, e in zip(spectra, entries, strict=True)
        )

    search = ErrorSearch()
    values = search.sensitivities(spectra, Budget(0.6), search.units(spectra), probe)
    removed = draw_removal(values, [1] * 4, 0.4, 1.0, [1.0] * 4)
    assert sorted(range(4), key=lambda i: values[i]) == sorted(range(4), key=lambda i: -removed[i])
    chosen = search.search(spectra, Budget(0.6), probe)
    assert probe(chosen) < probe(Uniform().allocate(spectra, Budget(0.6)))


def test_removal_meets_the_mean_inside_the_guard():
    sizes = [10, 20, 30, 40]
    removed = draw_removal([1e-6, 1.0, 2.0, 1e6], sizes, 0.3, 1.2, [1.0, 0.8, 1.3, 1.0])
    assert sum(r * s for r, s in zip(removed, sizes, strict=True)) / 100 == pytest.approx(0.3, abs=1e-9)
    assert min(removed) >= NARROW[0] * 0.3 - 1e-12
    assert max(removed) <= NARROW[1] * 0.3 + 1e-12
    assert draw_removal([1.0, 2.0, 3.0, 4.0], sizes, 0.3, 0.0, [1.0] * 4) == pytest.approx([0.3] * 4)


def test_ranks_repair_a_budget_that_the_smallest_ranks_overspend():
    groups = [spectrum.group for spectrum in problems_spectra()]
    ranks = fit_ranks(groups, [0.9] * len(groups), Budget(0.4))
    assert sum(r * ledger.parameters(g, 1) for r, g in zip(ranks, groups, strict=True)) <= ledger.allowed_parameters(
        groups, 0.4
    )
    assert mean_removed(groups, 0.4) == pytest.approx(0.6, abs=1e-3)


def test_infinite_losses_and_bad_options():
    spectra = problems_spectra()
    with pytest.raises(NumericalError, match="the loss of the dense model is nan"):
        ErrorSearch().search(spectra, Budget(0.6), lambda entries, held_out=False: float("nan"))
    for options, text in (
        ({"light": 1.0}, "error_search.light is 1, but must lie in (0, 1)."),
        ({"candidates": 0}, "error_search.candidates is 0, but must be positive."),
        ({"noise": -1.0}, "error_search.noise is -1, but must not be negative."),
    ):
        with pytest.raises(OptionError) as caught:
            ErrorSearch(**options)
        assert str(caught.value) == text
    with pytest.raises(DataError, match="1 windows, but a search holds some out"):
        split_for_search(torch.zeros(1, 4), 4, 1)


def test_windows_are_split_without_overlap():
    windows = torch.arange(20)[:, None]
    for scoring, held_out in ((32, 8), (4, 2), (100, 1)):
        a, b = split_for_search(windows, scoring, held_out)
        assert len(a) >= 1
        assert len(b) >= 1
        assert not set(a.flatten().tolist()) & set(b.flatten().tolist())


def test_the_search_on_a_model_resumes_and_leaves_it_as_it_was(tmp_path):
    """A second run asks the model nothing; the plan and the model are the same as without a work folder."""
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = Recipe(
        "mine", "svd_llm", "error_search", (), {"allocator": {"candidates": 5, "windows": 3, "held_out": 1}}
    )
    measured = []

    def plan(work):
        measured.clear()
        model = tiny_models()["llama"]()
        before = {name: p.clone() for name, p in model.named_parameters()}
        made = eckart.plan(
            model,
            tokenizer=tiny_tokenizer(),
            recipe=recipe,
            keep=0.7,
            calibration=eckart.Calibration(str(tmp_path / "text.txt"), windows=5, length=16),
            work=work,
            progress=lambda stage, done, total: measured.append(stage) if stage.startswith("probe") else None,
        )
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        return made, len(measured)

    bare, asked = plan(None)
    first, asked_first = plan(tmp_path / "work")
    again, asked_again = plan(tmp_path / "work")
    assert bare == first == again
    assert asked == asked_first > 0
    assert asked_again == 0
    assert bare.entries[0].details["search"]["loss"] <= bare.entries[0].details["search"]["loss_uniform"]
    assert bare.made_by["allocator"]["candidates"] == 5


def test_a_search_that_finds_nothing_finite_says_so():
    spectra = problems_spectra()

    def probe(entries, held_out=False):
        return 3.0 if all(entry.rank is None for entry in entries) else float("nan")

    with pytest.raises(
        NumericalError, match=r"^error_search: no candidate has a finite loss; ask for a larger share, or check"
    ):
        ErrorSearch(candidates=3).search(spectra, Budget(0.6), probe)
