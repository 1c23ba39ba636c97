"""Every factorizer and allocator under the same checks, found by scanning the folders."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType

import pytest

from eckart import registry
from eckart.allocators.base import Allocator
from eckart.allocators.uniform import Uniform
from eckart.checks import check_storage
from eckart.errors import OptionError
from eckart.recipes import BUILT_IN, find
from eckart.storages.pair import PairStorage
from eckart.testing import check_allocator, check_factorizer, check_refiner


@pytest.mark.parametrize("name", registry.names("factorizers"))
def test_factorizer(name):
    check_factorizer(registry.make("factorizers", name))


@pytest.mark.parametrize("name", registry.names("allocators"))
def test_allocator(name):
    check_allocator(registry.make("allocators", name))


@pytest.mark.parametrize("name", registry.names("refiners"))
def test_refiner(name):
    check_refiner(registry.make("refiners", name))


def test_the_scan_finds_the_methods():
    assert {"svd", "fwsvd", "asvd", "svd_llm"} <= set(registry.names("factorizers"))
    assert "uniform" in registry.names("allocators")


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_recipe_builds_and_describes_itself(name):
    described = find(name).to_dict()
    assert described["name"] == name
    assert described["factorizer"]["name"] in registry.names("factorizers")


@pytest.mark.parametrize(
    ("name", "overrides", "text"),
    [
        ("svdllm", {}, "unknown recipe 'svdllm'; did you mean 'svd-llm'?"),
        ("svd-llm", {"factorizer.dampin": 1}, "did you mean 'damping'? Known: damping."),
        ("svd-llm", {"factorizer.damping": "lots"}, "svd_llm.damping is 'lots', but must be a finite number."),
        ("svd-llm", {"metric.damping": 1}, "unknown part of a recipe 'metric'"),
        ("svd-llm", {"allocator": "unifrom"}, "unknown allocator 'unifrom'; did you mean 'uniform'?"),
        ("fwsvd", {"factorizer.side": "inptu"}, "unknown value of fwsvd.side 'inptu'; did you mean 'input'?"),
        ("asvd", {"factorizer.alpha": "-1"}, "asvd.alpha is -1, but must not be negative."),
        ("missing.toml", {}, "missing.toml: no such recipe file."),
    ],
)
def test_wrong_names_and_options(name, overrides, text):
    with pytest.raises(OptionError) as caught:
        find(name, overrides)
    assert text in str(caught.value)


def test_options_from_text_have_the_type_of_their_field():
    assert find("asvd", {"factorizer.alpha": "0.25"}).make_factorizer().alpha == 0.25


def test_recipe_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('about = "mine"\n[factorizer]\nname = "svd_llm"\ndamping = 1e-4\n[allocator]\nname = "uniform"\n')
    recipe = find(str(path))
    assert recipe.name == "mine"
    assert recipe.make_factorizer().damping == 1e-4


def test_grouping_and_refiners_in_a_recipe_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[factorizer]\nname = "svd_llm"\n[grouping]\nsize = 3\n'
        '[[refiners]]\nname = "refit-coefficients"\nmin_removed = 0.1\n'
    )
    recipe = find(str(path), {"refit_coefficients.damping": "1e-3"})
    assert recipe.make_grouping().size == 3
    (refiner,) = recipe.make_refiners()
    assert (refiner.min_removed, refiner.damping) == (0.1, 1e-3)
    assert find("basis-sharing", {"refiners": "none"}).make_refiners() == []
    path.write_text('[factorizer]\nname = "svd_llm"\n[[refiners]]\nmin_removed = 0.1\n')
    with pytest.raises(OptionError, match=r"each \[\[refiners\]\] table needs a name"):
        find(str(path))


def test_a_file_of_methods_without_its_method_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "eckart.allocators.uniform", ModuleType("eckart.allocators.uniform"))
    with pytest.raises(
        OptionError, match=r"^eckart/allocators/uniform\.py must define exactly one public method class\.$"
    ):
        registry.get("allocators", "uniform")


@dataclass(frozen=True)
class Generous(Allocator):
    """Gives its least where what is asked cannot be met."""

    def allocate(self, spectra, budget):
        possible = 0.4 <= budget.keep <= 1
        return Uniform().allocate(spectra, budget if possible else replace(budget, keep=0.4))


def test_an_allocator_that_meets_the_impossible_breaks_the_contract():
    with pytest.raises(AssertionError, match=r"^keep 0\.0 was not refused with BudgetError$"):
        check_allocator(Generous())


class Credulous(PairStorage):
    """Takes any rank."""

    name = "pair"

    def empty(self, out_features, in_features, spec, *, bias, dtype):
        known = type(spec["rank"]) is int and 1 <= spec["rank"] <= in_features
        spec = spec if known else {**spec, "rank": 1}
        return super().empty(out_features, in_features, spec, bias=bias, dtype=dtype)


def test_a_storage_that_takes_any_rank_breaks_the_contract():
    with pytest.raises(AssertionError, match=r"^an entry of rank 0 was not refused$"):
        check_storage(Credulous())
