"""The model card says what the plan and the provenance say, and its three ways to load are true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from mixed import mixed

from eckart.checkpoints import checkpoint
from eckart.checkpoints.card import card
from eckart.errors import OutputError
from eckart.plans.plan import Plan
from eckart.types import Entry

PROVENANCE: dict[str, Any] = {
    "model": {"source": "someone/small-model", "revision": "abc123"},
    "recipe": {"name": "svd-llm"},
    "calibration": {"spec": "/home/me/corpus.txt,wikitext2:8", "windows": 32, "length": 512, "tokens_hash": "f" * 64},
    "ledger": {
        "target_parameters_dense": 1000,
        "target_parameters_kept": 800,
        "model_parameters_dense": 4000,
        "model_parameters_kept": 3800,
        "model_bytes_dense": 16000,
        "model_bytes_kept": 15200,
    },
    "kl": {"measured": 0.2, "predicted": 0.1},
    "versions": {"eckart": "0.1.0", "torch": "2.13.0"},
}
PLAN = Plan((Entry(("a",), 3),), reached={"predicted_kl": 0.12345678})


def test_everything_known_is_said() -> None:
    text = card(PROVENANCE, PLAN)
    for words in (
        "[someone/small-model](https://huggingface.co/someone/small-model)",
        "| Revision | abc123 |",
        "| Recipe | `svd-llm` |",
        "| Kept of the compressed layers | 80.0% (800 of 1,000 parameters) |",
        "| Kept of the whole model | 95.0% (3,800 of 4,000 parameters) |",
        "| Size | 15,200 of 16,000 bytes |",
        "| Calibrated on | corpus.txt, wikitext2:8: 32 windows of 512 tokens, hash `ffffffffffff` |",
        "| Predicted KL | 0.1235 nats per token, from the dense model |",
        "| Measured KL | 0.2 nats per token, from the dense model |",
        "| Versions | eckart 0.1.0, torch 2.13.0 |",
    ):
        assert words in text
    assert "/home" not in text


def test_the_head_is_what_the_hub_reads() -> None:
    data = ModelCard(card(PROVENANCE, PLAN)).data
    assert data.base_model == "someone/small-model"
    assert data.base_model_relation == "quantized"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "eckart" in data.tags


@pytest.mark.parametrize("source", ["/home/me/model", "./model", "model", ""])
def test_a_local_model_is_no_base_model_of_the_hub(source: str) -> None:
    text = card({**PROVENANCE, "model": {"source": source}}, PLAN)
    assert ModelCard(text).data.base_model is None
    assert "huggingface.co" not in text
    assert "/home" not in text


def test_what_is_unknown_is_left_out() -> None:
    text = card({}, None)
    assert re.findall(r"^\| \w.*", text, re.MULTILINE) == ["| Made from | a model |"]
    assert "None" not in text


def test_its_ways_to_load_are_true(tmp_path: Path, ids: torch.Tensor) -> None:
    model = mixed("llama")
    checkpoint.save(model, tmp_path / "saved")
    text = (tmp_path / "saved/README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block.replace("FOLDER", str(tmp_path / "saved")), names)
        with torch.no_grad():
            assert torch.equal(names["model"](ids).logits, model(ids).logits)


def test_a_failed_save_leaves_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/README.md").write_text("mine")
    with pytest.raises(OutputError):
        checkpoint.save(mixed("llama"), tmp_path / "taken")
    assert (tmp_path / "taken/README.md").read_text() == "mine"

    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eckart.checkpoints.card.card", fail)
    with pytest.raises(OutputError):
        checkpoint.save(mixed("llama"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dense_model_has_no_card(tmp_path: Path) -> None:
    from eckart.testing import tiny_models

    checkpoint.save(tiny_models()["llama"](), tmp_path / "dense")
    assert not (tmp_path / "dense/README.md").exists()


def test_notes_that_somebody_has_spoiled_are_left_out() -> None:
    """A card is written anew by `convert`, from a provenance that anybody may have edited."""
    spoiled = {"calibration": 3, "kl": {"measured": "low"}, "model": [], "recipe": "x", "versions": {}}
    text = card(spoiled, None)
    assert "Calibrated" not in text
    assert "Measured" not in text
