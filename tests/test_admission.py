"""What is no model to compress is refused by name before any work, and a model keeps all that it has."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import eckart
from eckart.checkpoints import admission, checkpoint
from eckart.errors import ModelError, OptionError, OutputError
from eckart.testing import tiny_model, tiny_models, tiny_tokenizer

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """The folder of a dense tiny Llama with its tokenizer."""
    folder = tmp_path / "dense"
    tiny_models()["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def calibration(tmp_path: Path) -> eckart.Calibration:
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    return eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)


def change(folder: Path, tensors: Callable[[dict[str, Any]], None], config: dict[str, Any] | None = None) -> None:
    """Change the tensors and the configuration of a folder."""
    stored = load_file(folder / "model.safetensors")
    tensors(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))


def fp8(stored: dict[str, torch.Tensor]) -> None:
    for key in [key for key in stored if key.endswith("proj.weight")]:
        scale = stored[key].abs().max() / 448
        stored[key] = (stored[key] / scale).to(torch.float8_e4m3fn)
        stored[f"{key}_scale"] = scale.reshape(())


def int4(stored: dict[str, torch.Tensor]) -> None:
    for key in [key for key in stored if key.endswith("proj.weight")]:
        base = key.removesuffix("weight")
        stored[base + "qweight"] = torch.zeros(4, 32, dtype=torch.int32)
        stored[base + "scales"] = torch.ones(1, 32)


def int8(stored: dict[str, torch.Tensor]) -> None:
    for key in [key for key in stored if key.endswith("proj.weight")]:
        stored[key] = torch.zeros_like(stored[key], dtype=torch.int8)


def float_codes(stored: dict[str, torch.Tensor]) -> None:
    """Codes that somebody stored as floats, with their scales beside."""
    for key in [key for key in stored if key.endswith("proj.weight")]:
        stored[f"{key}_scale_inv"] = torch.ones(1)


def nothing(stored: dict[str, torch.Tensor]) -> None:
    pass


QUANTISED = {
    "a method that transformers does not know": (
        fp8,
        {"quantization_config": {"quant_method": "modelopt"}},
        "modelopt",
    ),
    "float8 and not a word": (fp8, {}, "F8_E4M3"),
    "packed weights and not a word": (int4, {}, "qweight"),
    "whole numbers and not a word": (int8, {}, "I8"),
    "scales that are left over": (float_codes, {}, "weight_scale_inv"),
    "a known method": (nothing, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "compressed-tensors of old": (nothing, {"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
    "below the text part": (nothing, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
}


@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_weights_are_refused(how: str, dense: Path) -> None:
    tensors, config, word = QUANTISED[how]
    change(dense, tensors, config)
    with pytest.raises(ModelError, match=rf"is quantised already \(.*{word}.*\), so .* compress the original model"):
        checkpoint.load_model(str(dense))


@pytest.mark.parametrize("name", admission.QUANTISED_BESIDE)
def test_a_quantisers_own_file_tells(name: str, dense: Path) -> None:
    (dense / name).write_text("{}")
    with pytest.raises(ModelError, match=name):
        checkpoint.load_model(str(dense))


def test_a_named_original_is_said(dense: Path) -> None:
    change(dense, nothing, {"quantization_config": {"quant_method": "modelopt"}, "base_model": "org/original"})
    with pytest.raises(ModelError, match="the original model, org/original"):
        eckart.inspect(str(dense))


@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_to_be_merged_first(alone: bool, dense: Path) -> None:
    if alone:
        for path in dense.iterdir():
            path.unlink()
    (dense / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(ModelError, match=r"holds a LORA adapter .* merge it first, with .*merge_and_unload"):
        checkpoint.load_model(str(dense))


def test_adapters_in_memory_are_refused(calibration: eckart.Calibration) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_models()["llama"](), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(ModelError, match="carries an adapter: merge it first"):
            eckart.compress(model, tokenizer=tiny_tokenizer(), recipe="svd-llm", calibration=calibration)


class Codes(torch.Tensor):
    """As quantisers keep their weights."""


@pytest.mark.parametrize("kind", ["codes", "float8"])
def test_quantised_weights_in_memory_are_refused(kind: str, calibration: eckart.Calibration) -> None:
    model = tiny_models()["llama"]()
    layer = model.model.layers[0].mlp.up_proj
    data = layer.weight.data
    codes = data.as_subclass(Codes) if kind == "codes" else data.to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is (Codes|torch\.float8)"):
        eckart.compress(model, tokenizer=tiny_tokenizer(), recipe="svd-llm", calibration=calibration)


def test_an_encoder_with_its_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"an encoder and a decoder \(T5ForConditionalGeneration\)"):
        checkpoint.load_model(str(tmp_path / "t5"))


def test_a_tensor_that_no_one_knows_is_an_error(dense: Path) -> None:
    change(dense, lambda stored: stored.update({"model.layers.0.self_attn.sinks": torch.ones(4)}))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.sinks in the weight files is no part of Llama"):
        checkpoint.load_model(str(dense))


@pytest.mark.parametrize("key", ["v_head.summary.weight", "mtp.layers.0.weight", "model.layers.0.rotary_emb.inv_freq"])
def test_another_head_or_a_draft_is_harmless_and_told(key: str, dense: Path, caplog: Any, ids: torch.Tensor) -> None:
    change(dense, lambda stored: stored.update({key: torch.ones(4)}))
    loaded = checkpoint.load_model(str(dense))
    assert torch.equal(loaded(ids).logits, tiny_models()["llama"]()(ids).logits)
    assert key in caplog.text or "inv_freq" in key  # which transformers drops itself


AUTO = {
    "reward": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "embedder": "AutoModel",
}
HEADS = {
    "reward": ("LlamaForSequenceClassification", {"num_labels": 1, "pad_token_id": 0, "tie_word_embeddings": True}),
    "tokens": ("LlamaForTokenClassification", {"num_labels": 5}),
    "embedder": ("LlamaModel", {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_model_keeps_its_own_class_and_head(
    head: str, tmp_path: Path, calibration: eckart.Calibration, ids: torch.Tensor
) -> None:
    name, options = HEADS[head]
    model = tiny_model("Llama", lm_head=name, **LLAMA, **options)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with torch.no_grad():
        before = model(ids[:1])[0]
    where = {"recipe": "svd-llm", "calibration": calibration}
    eckart.compress(str(tmp_path / "model"), keep=1.0, out=tmp_path / "whole", **where)
    made = eckart.compress(str(tmp_path / "model"), keep=0.5, out=tmp_path / "out", **where)
    for folder, exact in ((tmp_path / "whole", True), (tmp_path / "out", False)):
        loaded = eckart.load(folder)
        assert type(loaded).__name__ == name
        doors = json.loads((folder / "config.json").read_text()).get("auto_map", {})
        assert exact or set(doors) == {"AutoConfig", AUTO[head]}
        with torch.no_grad():
            assert torch.allclose(loaded(ids[:1])[0], before, atol=1e-5) == exact
    assert eckart.plan(str(tmp_path / "out" / ".." / "model"), keep=0.5, **where) == made.plan


@pytest.mark.parametrize(
    ("recipe", "part"),
    [("eckart", "factorizer two_sided"), ("duo-svd", "allocator knapsack"), ("fwsvd", "factorizer fwsvd")],
)
def test_recipes_that_need_next_tokens_say_so(
    recipe: str, part: str, tmp_path: Path, calibration: eckart.Calibration
) -> None:
    model = tiny_model("Llama", lm_head="LlamaForSequenceClassification", **LLAMA, num_labels=1, pad_token_id=0)
    with pytest.raises(OptionError, match=rf"the {part} needs the logits of a next token, .* such as svd-llm"):
        eckart.compress(model, tokenizer=tiny_tokenizer(), recipe=recipe, calibration=calibration)


def test_a_checkpoint_beside_other_files_stays_one(dense: Path, tmp_path: Path) -> None:
    """`inspect` refuses what `compress` refuses, from the configuration alone."""
    shutil.copytree(dense, tmp_path / "q")
    change(tmp_path / "q", nothing, {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(ModelError, match="quantised already"):
        eckart.inspect(str(tmp_path / "q"))
    assert eckart.inspect(str(dense)).targets


def test_a_model_that_is_spread_over_devices() -> None:
    from torch import distributed
    from torch.distributed.tensor import DTensor, init_device_mesh

    model = tiny_models()["llama"]()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, norm = init_device_mesh("cpu", (1,)), model.model.norm
        norm.weight = torch.nn.Parameter(DTensor.from_local(norm.weight.detach(), mesh))
        with pytest.raises(
            ModelError,
            match=r": is spread over devices \(model\.norm\.weight is a DTensor\); pass the whole model\.$",
        ):
            eckart.compress(model, tokenizer=tiny_tokenizer(), recipe="svd", keep=0.5)
    finally:
        distributed.destroy_process_group()


def test_what_cannot_be_tried_because_of_the_disk_is_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError, match=r"file/scratch: cannot be written: a file is in the way; name another place\.$"
    ):
        checkpoint.try_saving(tiny_models()["llama"](), tiny_tokenizer(), tmp_path / "file" / "scratch")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, r"^x{300}: cannot be read: File name too long\.$"),
        (
            "~nobody_of_this_name/model",
            r"^~nobody_of_this_name/model: no such folder: Could not determine home directory\.$",
        ),
    ],
)
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="there is no folder of such a name, says newer Python")
def test_a_name_that_no_folder_can_have(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        eckart.inspect(name)
    assert str(caught.value).isprintable()


def test_a_model_in_memory_without_its_tokenizer() -> None:
    with pytest.raises(OptionError, match=r"^a model in memory comes without its tokenizer; pass tokenizer=\.\.\.$"):
        eckart.compress(tiny_models()["llama"](), recipe="svd", keep=0.5)
