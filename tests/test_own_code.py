"""Models whose class transformers does not have: their code runs when it is trusted, and travels along."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import eckart
from eckart.errors import ModelError
from eckart.testing import tiny_model, tiny_tokenizer

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-tiny"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of a class of its own, with the code that has it."""
    folder = tmp_path / "own"
    tiny_model("Llama", **LLAMA).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    path = folder / "config.json"
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own-tiny", "architectures": ["OwnForCausalLM"], "auto_map": own}
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.fixture
def calibration(tmp_path: Path) -> eckart.Calibration:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    return eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)


def test_without_trust_it_is_refused(folder: Path, tmp_path: Path, calibration: Any) -> None:
    words = r"class \(OwnForCausalLM, model type 'own-tiny'\) comes with code of its own; read .*--trust-remote-code"
    with pytest.raises(ModelError, match=words):
        eckart.compress(str(folder), recipe="svd-llm", calibration=calibration, out=tmp_path / "out")
    with pytest.raises(ModelError, match=words):
        eckart.inspect(str(folder))
    assert not (tmp_path / "out").exists()


def test_with_trust_it_runs_and_travels(folder: Path, tmp_path: Path, calibration: Any, ids: torch.Tensor) -> None:
    trusting = {"recipe": "svd-llm", "calibration": calibration, "trust_remote_code": True}
    made = eckart.compress(str(folder), keep=0.6, out=tmp_path / "out", **trusting)
    assert "--trust-remote-code" in made.provenance["command"]
    assert (tmp_path / "out" / "modeling_own.py").is_file()
    with pytest.raises(ModelError, match="--trust-remote-code"):
        eckart.load(tmp_path / "out")
    loaded = eckart.load(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made.model(ids).logits)
        assert torch.equal(plain(ids).logits, made.model(ids).logits)


def test_a_class_that_nobody_brings(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["auto_map"]
    path.write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"model type 'own-tiny'\) is not one of transformers [\d.]+.* and its folder brings no"
    ):
        eckart.inspect(str(folder))
