"""Decompose and observe once, meet the goal, then correct: what is measured, how often, and on what."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

import eckart
from eckart.allocators.base import Allocator, checked, entry_for
from eckart.errors import OptionError
from eckart.measuring import scene, sensitivity, similarity
from eckart.tiny import tiny_models, tiny_tokenizer
from eckart.types import Budget, Entry, Level, Spectrum

TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (4000,), generator=torch.Generator().manual_seed(0)))
DUO = {"allocator.windows": 2, "allocator.length": 16, "allocator.measured": "0.4,0.7,1.0"}


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))  # nothing that another test measured
    (tmp_path / "text.txt").write_text(TEXT)
    return eckart.Calibration(str(tmp_path / "text.txt"), windows=6, length=32)


def plan(calibration, recipe, **options):
    model = tiny_models()["llama"]()
    return eckart.plan(model, tokenizer=tiny_tokenizer(), recipe=recipe, calibration=calibration, **options)


@pytest.fixture
def measured(monkeypatch):
    """How often curves and similarities are measured, and near which share."""
    seen: list[tuple[str, float]] = []
    for module in (sensitivity, similarity):
        name, real = module.__name__.rpartition(".")[2], module.observe

        def counted(scene: Any, allocator: Any, name: str = name, real: Any = real) -> Any:
            seen.append((name, scene.keep))
            return real(scene, allocator)

        monkeypatch.setattr(module, "observe", counted)
    return seen


@pytest.mark.parametrize("goal", [{"keep": 0.6}, {"size": 60_000}])
@pytest.mark.parametrize(("recipe", "what"), [("duo-svd", "sensitivity"), ("cpsvd", "similarity")])
def test_a_goal_observes_once(calibration, measured, goal, recipe, what):
    made = plan(calibration, recipe, options=DUO if recipe == "duo-svd" else {}, **goal)
    ((name, keep),) = measured
    assert name == what
    assert keep == pytest.approx(goal.get("keep", made.reached["keep"]), abs=0.1)
    if "size" in goal:
        assert made.reached["model_bytes_kept"] <= goal["size"]
        assert made.reached["model_bytes_kept"] > 0.75 * goal["size"]


def test_a_bound_on_the_loss_observes_once(calibration, measured):
    options = {"factorizer": "two_sided", **DUO}
    made = plan(calibration, "duo-svd", max_kl=0.3, options=options)
    assert len(measured) == 1
    assert made.reached["predicted_kl"] <= 0.3


@dataclass(frozen=True)
class Curious(Allocator):
    """Wants a similarity and a corrected prediction; remembers the spectra that it was shown."""

    wants: ClassVar[tuple[str, ...]] = ("similarity",)
    shown: ClassVar[list[list[Spectrum]]] = []

    def allocate(self, spectra: list[Spectrum], budget: Budget) -> list[Entry]:  # type: ignore[override]
        checked(spectra, budget)
        self.shown.append(list(spectra))
        return [entry_for(s.group, budget.keep, budget) for s in spectra]

    def correction_level(self) -> Level:
        return "cheap"


def test_a_correction_keeps_what_was_observed_and_is_not_lost(calibration):
    Curious.shown.clear()
    recipe = eckart.Recipe("curious", "two_sided", f"{__name__}:Curious")
    made = plan(calibration, recipe, keep=0.6)
    first, corrected = Curious.shown
    assert all("similarity" in spectrum.observed for spectrum in [*first, *corrected])
    assert [s.nats for s in first] != [s.nats for s in corrected]
    assert made.reached["predicted_kl"] == pytest.approx(made.reached["measured_kl"], rel=0.02)
    assert made.reached["predicted_kl"] != pytest.approx(made.reached["predicted_kl_uncorrected"], rel=0.01)


def number_of_the_block(scene: scene.Scene, allocator: Any) -> Mapping[str, int]:
    return {group.name: group.targets[0].block for group in scene.groups}


@dataclass(frozen=True)
class ByBlock(Curious):
    wants: ClassVar[tuple[str, ...]] = (f"{__name__}:number_of_the_block",)


@dataclass(frozen=True)
class Wishful(Curious):
    wants: ClassVar[tuple[str, ...]] = ("tea_leaves",)


def test_one_may_bring_a_measurement_of_ones_own(calibration):
    ByBlock.shown.clear()
    plan(calibration, eckart.Recipe("mine", "svd_llm", f"{__name__}:ByBlock"), keep=0.6)
    for spectrum in ByBlock.shown[-1]:
        assert spectrum.observed[ByBlock.wants[0]] == spectrum.group.targets[0].block


def test_a_wish_that_nothing_measures_is_refused(calibration):
    with pytest.raises(OptionError, match="Wishful wants 'tea_leaves', which nothing measures"):
        plan(calibration, eckart.Recipe("mine", "svd_llm", f"{__name__}:Wishful"), keep=0.6)


def test_a_replayed_plan_measures_its_divergence(calibration, tmp_path):
    made = plan(calibration, "eckart", keep=0.6)
    replayed = eckart.compress(
        tiny_models()["llama"](), tokenizer=tiny_tokenizer(), plan=replace(made, reached={}), calibration=calibration
    )
    assert replayed.provenance["kl"]["measured"] == pytest.approx(made.reached["measured_kl"], rel=1e-3)


def test_a_work_folder_takes_decompositions_and_gives_the_same_plan(calibration, tmp_path):
    work = tmp_path / "work"
    sizes = []

    def on_plan(_: eckart.Plan) -> None:
        (spill,) = work.glob("decompositions-*")
        sizes.append(sum(path.stat().st_size for path in spill.glob("*.safetensors")))

    options = {"tokenizer": tiny_tokenizer(), "recipe": "eckart", "keep": 0.6, "calibration": calibration}
    spilled = eckart.compress(tiny_models()["llama"](), work=work, on_plan=on_plan, **options)
    held = eckart.compress(tiny_models()["llama"](), **options)
    assert sizes[0] > 10_000
    assert not list(work.glob("decompositions-*"))
    assert spilled.plan.entries == held.plan.entries
    for name, tensor in held.model.state_dict().items():
        assert torch.equal(spilled.model.state_dict()[name], tensor), name
