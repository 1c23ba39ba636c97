"""What stands beside the weights travels along, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

import eckart
from eckart.testing import tiny_models, tiny_tokenizer

BESIDE = {
    "LICENSE": "free",
    "preprocessor_config.json": '{"size": 224}',
    "processor_config.json": "{}",
    "modules.json": '[{"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}, {"idx": 0, "path": ""}]',
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": '{"pooling_mode_lasttoken": true}',
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "layers that follow the model",
    "assets/figure.png": "picture",
    "modeling_other.py": "code = 1",
}
NOT = {
    "README.md": "of the dense model",
    "pytorch_model.bin.index.json": "{}",
    "original/consolidated.00.pth": "weights",
    "onnx/model.onnx": "weights",
    "optimizer.pt": "state",
    "training_args.bin": "state",
    "trainer_state.json": "{}",
    "checkpoint-500/config.json": "{}",
    ".cache/huggingface/x.lock": "",
    "__pycache__/x.pyc": "",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_models()["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name, text in (BESIDE | NOT).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def compressed(model: Path, tmp_path: Path, **options: Any) -> Path:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=2, length=32)
    eckart.compress(
        str(model), recipe="svd-llm", keep=0.6, calibration=calibration, out=tmp_path / "out", **options
    )  # fmt: skip
    return tmp_path / "out"


def test_all_of_it_and_nothing_that_is_weights(model: Path, tmp_path: Path) -> None:
    out = compressed(model, tmp_path)
    for name, text in BESIDE.items():
        assert (out / name).read_text() == text, name
    assert (out / "README.md").read_text() != NOT["README.md"]
    assert not [name for name in NOT if name != "README.md" and (out / name).exists()]
    assert {"LICENSE", "1_Pooling/config.json"} <= json.loads((out / "provenance.json").read_text())["files"].keys()
    assert eckart.verify(out).whole
    assert eckart.load(out)


def test_what_is_converted_keeps_it(model: Path, tmp_path: Path) -> None:
    out = compressed(model, tmp_path)
    eckart.convert(out, storage="pivoted", out=tmp_path / "pivoted")
    eckart.convert(out, storage="dense", out=tmp_path / "dense")
    for folder in (tmp_path / "pivoted", tmp_path / "dense"):
        for name, text in BESIDE.items():
            assert (folder / name).read_text() == text, name


def test_another_tokenizer_brings_its_own_files(model: Path, tmp_path: Path) -> None:
    (model / "merges.txt").write_text("of the model's own tokenizer")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    out = compressed(model, tmp_path, tokenizer=str(tmp_path / "other"))
    assert not (out / "merges.txt").exists()
    assert (out / "LICENSE").exists()
    assert f"--tokenizer {tmp_path / 'other'}" in json.loads((out / "provenance.json").read_text())["command"]
