"""Checkpoints that version 0.1 wrote before storages had files of their own load bit for bit, on every road."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eckart
from eckart.checkpoints import checkpoint

FOLDERS = sorted(path for path in (Path(__file__).parent / "data" / "checkpoints").iterdir() if path.is_dir())
ALONE = """
import json, sys
sys.modules["eckart"] = None  # as where it is not installed
import torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits[:, -1].tolist()))
"""

pytestmark = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(folder.with_suffix(".safetensors"))
    return stored["ids"], stored["logits"]


@torch.no_grad()
def test_they_load_bit_for_bit(folder):
    ids, logits = expected(folder)
    for model in (eckart.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.allclose(model(input_ids=ids).logits[:, -1], logits, atol=1e-5)  # processors round differently
        stored = load_file(folder / "model.safetensors")
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items() if tensor.numel())


def test_the_code_that_they_carry_still_reads_them(folder, tmp_path):
    ids, logits = expected(folder)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, str(folder), json.dumps(ids.tolist())],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), logits, atol=1e-5)


def test_saved_again_they_carry_todays_code(folder, tmp_path):
    model, plan = eckart.load(folder), checkpoint.read_plan(folder)
    eckart.save(model, tmp_path / "again", plan=plan, tokenizer=checkpoint.load_tokenizer(folder))
    again = eckart.load(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (tmp_path / "again" / "storages.py").is_file()
