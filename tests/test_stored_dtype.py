"""What is measured is the model as it is stored, rounding included."""

from pathlib import Path

import torch

import eckart
from eckart.measuring.held_out import HeldOut
from eckart.model.discovery import discover
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.text.data import load_windows


def test_the_kl_is_that_of_the_stored_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(6000)))
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)
    where = {"tokenizer": tiny_tokenizer(), "recipe": "eckart", "keep": 1.0, "calibration": calibration}
    dense = tiny_models()["llama"]()
    made = eckart.compress(tiny_models()["llama"](), dtype="bfloat16", out=tmp_path / "out", **where)
    stored = eckart.load(tmp_path / "out").float()
    windows = load_windows(str(tmp_path / "text.txt"), tiny_tokenizer(), windows=4, length=32, spare=8)
    held_out = HeldOut.of(dense, discover(dense), windows)
    for name, parameter in dense.named_parameters():
        parameter.data.copy_(stored.get_parameter(name))
    assert made.provenance["kl"]["measured"] > 0  # at keep 1 nothing is cut: it is rounding alone
    assert abs(made.provenance["kl"]["measured"] - held_out.kl()) < 1e-6 + 1e-3 * held_out.kl()


def test_in_the_stored_dtype_nothing_is_rounded(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(6000)))
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)
    where = {"tokenizer": tiny_tokenizer(), "recipe": "eckart", "keep": 1.0, "calibration": calibration}
    made = eckart.compress(tiny_models()["llama"](), **where)
    assert abs(made.provenance["kl"]["measured"]) < 1e-6
    assert made.model.dtype == torch.float32
