"""Models that see, by folder: their decoder is compressed, all the rest stays bit for bit, and the result loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import eckart
from eckart.testing import tiny_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
QWEN_EYE = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}


def llava() -> Any:
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**EYE))
    return tf.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=TEXT, vision_config=EYE, mm_tokens_per_image=4)
    )


def qwen3_vl() -> Any:
    text, eye = {**TEXT, "rope_parameters": ROPE}, {**QWEN_EYE, "deepstack_visual_indexes": [0]}
    return tf.Qwen3VLForConditionalGeneration(tf.Qwen3VLConfig(text_config=text, vision_config=eye))


@pytest.mark.parametrize("recipe", ["svd-llm", "eckart"])
@pytest.mark.parametrize("make", [llava, gemma3, qwen3_vl])
def test_the_decoder_is_compressed_and_the_rest_stays(
    make: Callable[[], Any], recipe: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 300)
    calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows=4, length=32)
    made = eckart.compress(
        str(tmp_path / "model"), recipe=recipe, keep=0.6, calibration=calibration, out=tmp_path / "out"
    )
    assert all("language_model" in target.name for target in made.layout.targets)
    before = dict(model.named_parameters())
    for loaded in (eckart.load(tmp_path / "out"), tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")):
        assert type(loaded) is type(model)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, made.model(ids).logits)
        seen = {name: p for name, p in loaded.named_parameters() if "vision" in name or "visual" in name}
        assert len(seen) > 10
        assert all(torch.equal(parameter, before[name]) for name, parameter in seen.items())
    assert eckart.verify(tmp_path / "out").whole


def test_a_factor_that_is_missing_under_another_name_is_missed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llava().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    eckart.compress(str(tmp_path / "model"), recipe="svd", keep=0.6, out=tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    (key,) = [key for key in stored if key.endswith("layers.1.mlp.up_proj.basis.weight")]
    del stored[key]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.basis\.weight: is missing"):
        tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
