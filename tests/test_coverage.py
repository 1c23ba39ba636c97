"""What is covered comes first, and a goal that next to nothing could serve is refused before any work."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eckart
from eckart._cli import main
from eckart.errors import BudgetError
from eckart.model.discovery import discover
from eckart.tiny import tiny_models, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import families


def with_experts(share: float) -> Any:
    """A Llama whose blocks are experts to this share of their parameters."""
    model = tiny_models()["llama"]()
    for layer in model.model.layers:
        inside = sum(p.numel() for p in layer.parameters())
        layer.experts = nn.ParameterList([nn.Parameter(torch.zeros(4, 8, round(inside * share / (1 - share) / 32)))])
    return model


@pytest.fixture
def calibration(tmp_path: Path) -> eckart.Calibration:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    return eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)


def test_the_share_counts_every_parameter_of_the_blocks_once() -> None:
    layout = discover(with_experts(0.9))
    model = with_experts(0.9)
    inside = {id(p): p.numel() for p in model.model.layers.parameters()}
    assert layout.block_parameters == sum(inside.values())
    assert layout.covered == layout.target_parameters / layout.block_parameters
    assert sum(layout.uncovered.values()) + layout.covered == pytest.approx(1)
    assert layout.coverage.startswith("targets are 9.9% of the blocks' parameters; untouched: 90.0% (fused 3-D")
    assert discover(tiny_models()["llama"]()).coverage.startswith("targets are 99.")


@pytest.mark.parametrize("verb", [eckart.compress, eckart.plan])
@pytest.mark.parametrize("goal", [{"keep": 0.8}, {"max_kl": 0.1}, {}])
def test_little_is_refused_unless_named(
    verb: Any, goal: dict[str, float], calibration: eckart.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokenizer": tiny_tokenizer(), "recipe": "eckart", "calibration": calibration}
    with monkeypatch.context() as patch:
        patch.setattr("eckart.planning.planner.decompose", None)  # without it nothing can run
        with pytest.raises(
            BudgetError, match=r"^LlamaForCausalLM: targets are 9\.9% of .* untouched: 90\.0% .* --include 'mlp\.\*'"
        ):
            verb(with_experts(0.9), **goal, **options)


def test_what_is_named_or_enough_is_compressed(calibration: eckart.Calibration) -> None:
    options = {"tokenizer": tiny_tokenizer(), "recipe": "svd-llm", "keep": 0.8, "calibration": calibration}
    made = eckart.compress(with_experts(0.9), include=["mlp.*"], **options)
    assert {target.kind.partition(".")[0] for target in made.layout.targets} == {"mlp"}
    enough = eckart.compress(with_experts(0.5), **options)
    assert enough.provenance["coverage"]["covered"] == enough.layout.covered > 0.4
    spectra = eckart.spectra(with_experts(0.9), **{k: v for k, v in options.items() if k != "keep"})
    assert len(spectra) == 14


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eckart", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_inspect_leads_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.build("dbrx").save_pretrained(tmp_path / "model")  # whose experts compute in a way of their own
    first = run(["inspect", str(tmp_path / "model")], capsys).splitlines()[0]
    assert first.startswith("Targets are ")
    assert "untouched: " in first
    found = json.loads(run(["inspect", str(tmp_path / "model"), "--json"], capsys))
    assert found["covered"] < 0.5
    assert sum(found["uncovered"].values()) + found["covered"] == pytest.approx(1)
