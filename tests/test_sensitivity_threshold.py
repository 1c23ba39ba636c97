"""ASVD's rank search: one bound on every group's own measured loss, the lowest that the budget admits."""

import pytest
import torch

from eckart import Calibration, compress, ledger
from eckart.allocators.sensitivity_threshold import SensitivityThreshold
from eckart.errors import BudgetError, OptionError
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.types import Budget, Group, Spectrum, Target

SHARES = SensitivityThreshold().shares


def measured(block, slope, size=64):
    """A group whose loss rises by `slope` for each tenth that is removed."""
    group = Group((Target(f"{block}.linear", block, "linear", size, size, False),))
    curve = {share: slope * (1 - share) for share in (*SHARES, 1.0)}
    return Spectrum(group, torch.zeros(size, dtype=torch.float64), observed={"sensitivity_alone": curve})


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 0.95])
def test_the_bound_is_the_lowest_that_the_budget_admits(keep):
    """Against every bound there is, tried one by one."""
    generator = torch.Generator().manual_seed(0)
    spectra = [measured(block, float(torch.rand(1, generator=generator)) + 0.1) for block in range(12)]
    allowed = ledger.allowed_parameters([s.group for s in spectra], keep)

    def plan(bound):
        shares = [min([s for s in SHARES if x.observed["sensitivity_alone"][s] <= bound], default=1.0) for x in spectra]
        return [None if share == 1 else int(share * 64 * 64 // 128) for share in shares]

    def cost(ranks):
        return sum(64 * 64 if rank is None else 128 * rank for rank in ranks)

    bounds = sorted({loss for s in spectra for loss in s.observed["sensitivity_alone"].values()})
    expected = next(ranks for ranks in map(plan, bounds) if cost(ranks) <= allowed)
    assert [entry.rank for entry in SensitivityThreshold().allocate(spectra, Budget(keep))] == expected


def test_what_matters_is_cut_less():
    spectra = [measured(0, 1.0), measured(1, 10.0)]
    ranks = [entry.rank for entry in SensitivityThreshold().allocate(spectra, Budget(0.6))]
    assert ranks[1] is None
    assert ranks[0] is not None
    assert [e.rank for e in SensitivityThreshold().allocate(spectra, Budget(1.0))] == [None, None]


def test_refusals():
    with pytest.raises(OptionError, match=r"shares lie in \(0, 1\)"):
        SensitivityThreshold(shares=(0.5, 1.0))
    with pytest.raises(OptionError, match="must be shares"):
        SensitivityThreshold(shares=("a",))
    with pytest.raises(OptionError, match="the threshold needs measured losses"):
        SensitivityThreshold().allocate([Spectrum(measured(0, 1.0).group, torch.zeros(64))], Budget(0.5))
    with pytest.raises(BudgetError, match=r"with the smallest of sensitivity_threshold\.shares everywhere"):
        SensitivityThreshold(shares=(0.5, 0.9)).allocate([measured(0, 1.0)], Budget(0.3))


def test_asvd_with_its_search_on_a_model(tmp_path):
    """Through the recipe: each group is measured alone, beside a dense model, and a second run measures nothing."""
    (tmp_path / "text.txt").write_text("rain falls down on a tin roof and the cat sat on the mat " * 40)
    how = {
        "recipe": "asvd",
        "keep": 0.6,
        "calibration": Calibration(str(tmp_path / "text.txt"), windows=4, length=16),
        "work": tmp_path / "work",
        "options": {"allocator": "sensitivity_threshold", "allocator.shares": (0.3, 0.6), "allocator.length": 16},
    }
    made, again = (compress(tiny_models()["llama"](), tokenizer=tiny_tokenizer(), **how) for _ in range(2))
    assert made.ledger.keep <= 0.6
    assert made.plan.entries == again.plan.entries
