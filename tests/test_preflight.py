"""What can be refused is refused before the first costly step: nothing is calibrated, nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.errors import BudgetError, DataError, ModelError, OptionError, PlanError, UserError
from eckart.storages.pair import FactorizedLinear
from eckart.support.dtypes import round_
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.types import Entry


@pytest.fixture
def calibration(tmp_path: Path) -> eckart.Calibration:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    return eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)


@pytest.fixture(autouse=True)
def no_costly_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a costly step was begun")

    monkeypatch.setattr("eckart.planning.planner.decompose", never)


def refused(error: type[UserError], words: str, tmp_path: Path, **options: Any) -> None:
    model = options.pop("model", None) or tiny_models()["llama"]()
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    with pytest.raises(error, match=words):
        eckart.compress(model, tokenizer=tokenizer, out=tmp_path / "out", **{"recipe": "svd-llm", **options})
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a card")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "tpu", "cpu:x", "", "meta"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path, calibration: eckart.Calibration) -> None:
    refused(OptionError, rf"device is '{device}'", tmp_path, device=device, calibration=calibration)


@pytest.mark.parametrize("option", ["factorizer.dampin", "allocator.x", "refiners", "grouping.size"])
def test_parts_and_options(option: str, tmp_path: Path, calibration: eckart.Calibration) -> None:
    refused(OptionError, ".", tmp_path, options={option: "nonsense"}, calibration=calibration)


def test_a_bound_on_the_loss_by_a_recipe_that_predicts_none(tmp_path: Path, calibration: eckart.Calibration) -> None:
    refused(OptionError, "max_kl needs a recipe that predicts", tmp_path, max_kl=0.1, calibration=calibration)


def test_a_size_below_what_is_never_compressed(tmp_path: Path, calibration: eckart.Calibration) -> None:
    refused(BudgetError, "size is 5000 bytes", tmp_path, size=5000, calibration=calibration)


def test_a_plan_of_another_model(tmp_path: Path, calibration: eckart.Calibration) -> None:
    plan = eckart.Plan((Entry(("model.layers.7.self_attn.q_proj",), 4),))
    refused(PlanError, "not a target of this model", tmp_path, plan=plan, calibration=calibration)


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    calibration = eckart.Calibration(str(tmp_path / "short.txt"), windows=4, length=32)
    refused(DataError, "has 10 tokens", tmp_path, calibration=calibration)


def test_tokens_that_the_embedding_does_not_have(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"zq{i}" for i in range(60)])
    (tmp_path / "zq.txt").write_text("the zq50 cat " * 300)
    calibration = eckart.Calibration(str(tmp_path / "zq.txt"), windows=4, length=32)
    words = r"holds token \d+, but the model has an embedding of 128 tokens.*resize_token_embeddings"
    refused(DataError, words, tmp_path, tokenizer=tokenizer, calibration=calibration)


def test_a_generation_config_that_will_not_save(tmp_path: Path, calibration: eckart.Calibration) -> None:
    model = tiny_models()["llama"]()
    model.generation_config.temperature = -1.0  # with sampling off, which saving refuses
    model.generation_config.do_sample = False
    model.generation_config.num_beams = -3
    refused(ModelError, "its generation configuration cannot be saved", tmp_path, model=model, calibration=calibration)


def test_a_tokenizer_that_will_not_save(
    tmp_path: Path, calibration: eckart.Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()

    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no fast\nfile")

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    refused(ModelError, "its tokenizer cannot be saved: no fast file", tmp_path, tokenizer=tokenizer,
            calibration=calibration)  # fmt: skip


def test_dense_weights_beyond_the_stored_dtype(tmp_path: Path, calibration: eckart.Calibration) -> None:
    model = tiny_models()["llama"]()
    model.model.embed_tokens.weight.data[5, 5] = 1e5
    words = r"embed_tokens\.weight: holds values up to 1e\+05, but float16 ends at 65504; store in bfloat16"
    refused(OptionError, words, tmp_path, model=model, dtype="float16", calibration=calibration)


def test_a_model_that_does_not_run_on_tokens_alone(tmp_path: Path, calibration: eckart.Calibration) -> None:
    model = tiny_models()["llama"]()
    forward = model.forward

    def wants_more(input_ids: Any, pixels: Any, **options: Any) -> Any:
        return forward(input_ids=input_ids, **options)

    model.forward = wants_more
    refused(ModelError, "does not run on token ids alone", tmp_path, model=model, calibration=calibration)


def test_factors_beyond_the_stored_dtype_are_found_before_they_are_infinite() -> None:
    layer = FactorizedLinear(4, 4, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
        layer.coefficients.weight[1, 1] = 7e4
    with pytest.raises(
        OptionError, match=r"coefficients\.weight: holds values up to 7e\+04, but float16 ends at 65504"
    ):
        round_(layer, torch.float16)
    assert round_(layer, torch.bfloat16)
    assert not round_(layer, torch.float32)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="for machines without one")
def test_a_machine_without_an_apple_chip_measures_on_none() -> None:
    words = r"^device is 'mps', but this machine or this torch has none; use cpu\.$"
    with pytest.raises(OptionError, match=words):
        eckart.evaluate(tiny_models()["llama"](), tokenizer=tiny_tokenizer(), data_specs=["x.txt"], device="mps")
