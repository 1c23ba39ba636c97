"""A checkpoint in half precision on a CPU: computed in float32, stored as it was, measured in what is asked for."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart._cli import main
from eckart.checkpoints import checkpoint
from eckart.evaluation import samples
from eckart.testing import tiny_models, tiny_tokenizer

TEXT = ("--data", "text.txt", "--windows", "5", "--length", "24")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Folders `bfloat16`, `float16`, and of the very same numbers `bfloat16 in float32`, `float16 in float32`."""
    for name, dtype in HALF.items():
        model = tiny_models()["llama"]().to(dtype)
        for folder in (name, f"{name} in float32"):
            model.save_pretrained(tmp_path / folder)
            tiny_tokenizer().save_pretrained(tmp_path / folder)
            model = model.to(torch.float32)
    (tmp_path / "text.txt").write_text("Half of the digits are enough to keep, and too few to compute with. " * 40)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(workspace, monkeypatch, capsys):
    def runner(*words):
        monkeypatch.setattr(sys, "argv", ["eckart", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert caught.value.code == 0, said.err
        return said.out

    return runner


def tensors(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("recipe", ["svd-llm", "eckart"])  # pairs; gradients, pivoted layers, probes
def test_it_is_computed_in_float32_and_rounded_once(run, half, recipe):
    """The oracle is what float32 makes of the same numbers; arithmetic in half would show in every factor."""
    run("compress", half, "--recipe", recipe, "--keep", "0.7", *TEXT, "--out", "small")
    run("compress", f"{half} in float32", "--recipe", recipe, "--keep", "0.7", *TEXT, "--out", "exact")
    small, exact = tensors("small"), tensors("exact")
    assert small.keys() == exact.keys()
    guard = min(checkpoint.load("small").hf_quantizer.quantization_config.modules) + ".weight"
    for name, tensor in small.items():
        if tensor.dtype is not torch.int32:
            assert tensor.dtype is HALF[half], name
            assert name == guard or exact[name].dtype is torch.float32
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    for name, tensor in tensors(half).items():  # what is not compressed is what it was
        assert name not in small or name == guard or torch.equal(small[name], tensor)
    assert json.loads(Path("small/config.json").read_text())["dtype"] == half
    assert eckart.load("small").dtype is HALF[half]
    ledger = json.loads(Path("small/provenance.json").read_text())["ledger"]
    assert ledger["model_bytes_kept"] == sum(tensor.nbytes for tensor in small.values())


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_another_dtype_can_be_stored(run, stored):
    run("compress", "bfloat16", "--recipe", "svd", "--keep", "0.7", "--dtype", stored, "--out", "other")
    run("compress", "bfloat16 in float32", "--recipe", "svd", "--keep", "0.7", "--out", "exact")
    dtype = getattr(torch, stored)
    for name, tensor in tensors("exact").items():
        found = tensors("other")[name]
        assert torch.equal(found, tensor.to(found.dtype)), name
    assert eckart.load("other").dtype is dtype


def by_hand(folder, dtype):
    """Perplexity of a folder on the same windows, in this dtype."""
    model = checkpoint.load_model(folder, dtype=dtype)
    total, count = 0.0, 0
    for window in eckart.load_windows("text.txt", tiny_tokenizer(), windows=5, length=24, purpose="evaluation").ids:
        with torch.no_grad():
            log_p = model(input_ids=window[None]).logits[0, :-1].float().log_softmax(-1)
        total -= float(log_p.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return float(torch.tensor(total / count).exp())


def test_it_is_measured_in_float32_unless_told_otherwise(run):
    run("compress", "bfloat16", "--recipe", "svd", "--keep", "0.6", "--out", "small")
    found = {}
    for asked in ("auto", "float32", "bfloat16"):
        said = run("eval", "small", "--against", "bfloat16", *TEXT, "--dtype", asked, "--json")
        found[asked] = json.loads(said)["results"][0]
    assert found["auto"] == found["float32"]
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        row = found[asked]
        assert row["protocol"]["dtype"] == str(dtype).removeprefix("torch.")
        assert row["perplexity"] == pytest.approx(by_hand("small", dtype), rel=1e-5)
        assert row["dense_perplexity"] == pytest.approx(by_hand("bfloat16", dtype), rel=1e-5)
    assert found["auto"]["perplexity"] != pytest.approx(found["bfloat16"]["perplexity"], rel=1e-5)


def test_samples_are_written_in_float32_too(workspace, monkeypatch):
    seen = []
    cast = eckart.support.dtypes.cast_
    monkeypatch.setattr("eckart.support.dtypes.cast_", lambda model, dtype: (seen.append(dtype), cast(model, dtype)))
    assert samples.write("bfloat16", ["A"], new_tokens=3) == samples.write("bfloat16 in float32", ["A"], new_tokens=3)
    samples.write("bfloat16", ["A"], new_tokens=1, dtype="bfloat16")
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
