"""Models that see, by folder: their decoder is compressed, all the rest stays bit for bit, and the result loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import eckart
from eckart.model.discovery import discover
from eckart.plans import Plan
from eckart.testing import tiny_tokenizer
from eckart.types import Entry

TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
THERE = 100  # the token in whose place an image or a sound is put
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
QWEN_EYE = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}


def llava() -> Any:
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**EYE), image_token_index=THERE
    )
    return tf.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=TEXT, vision_config=EYE, mm_tokens_per_image=4, image_token_index=THERE)
    )


def qwen3_vl() -> Any:
    text, eye = {**TEXT, "rope_parameters": ROPE}, {**QWEN_EYE, "deepstack_visual_indexes": [0]}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=eye, image_token_id=THERE)
    return tf.Qwen3VLForConditionalGeneration(config)


def qwen2_audio() -> Any:
    ear = {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 8,
        "max_source_positions": 8,
    }  # fmt: skip
    config = tf.Qwen2AudioConfig(text_config={**TEXT, "model_type": "qwen2"}, audio_config=ear, audio_token_index=THERE)
    return tf.Qwen2AudioForConditionalGeneration(config)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def words(tokens: int) -> torch.Tensor:
    """Some words with an image or a sound among them."""
    return torch.tensor([[5, 9, *[THERE] * tokens, 17, 40, 8]])


def says(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits. (Llama 4 is not among the models: in transformers 5.24 its own multimodal class fails in its forward.)"""
    logits: torch.Tensor = model(**inputs).logits
    return logits


# A model, and what it is given beside the words.
SENSES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "llava": (llava, lambda: {"input_ids": words(4), "pixel_values": noise(1, 3, 28, 28)}),
    "gemma3": (gemma3, lambda: {"input_ids": words(4), "pixel_values": noise(1, 3, 28, 28)}),
    "qwen3_vl": (
        qwen3_vl,
        lambda: {
            "input_ids": words(4),
            "pixel_values": noise(16, 1536),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": (words(4) == THERE).int(),
        },
    ),
    "qwen2_audio": (
        qwen2_audio,
        lambda: {
            "input_ids": words(4),
            "input_features": noise(1, 8, 16),
            "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
        },
    ),
}


@pytest.mark.parametrize("family", sorted(SENSES))
@torch.no_grad()
def test_what_is_seen_and_heard_stays(family: str, tmp_path: Path) -> None:
    """Logits with an image or a sound: the same where all is kept, and with every target in factors of full rank."""
    make, given = SENSES[family]
    torch.manual_seed(0)
    model, inputs = make().eval(), given()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_mean": [0.5], "of": "the eye"}')
    expected = says(model, inputs)
    alone = torch.where(inputs["input_ids"] == THERE, 6, inputs["input_ids"])
    assert not torch.allclose(says(model, {"input_ids": alone}), expected, atol=1e-3)  # it matters
    targets = discover(model).targets
    full = Plan(tuple(Entry((t.name,), min(t.out_features, t.in_features)) for t in targets))
    for name, how in {"kept": {"keep": 1.0}, "exact": {"plan": full}}.items():
        eckart.compress(str(tmp_path / "model"), recipe="svd", out=tmp_path / name, **how)
        loaded = eckart.load(tmp_path / name)
        assert type(loaded) is type(model)
        assert torch.allclose(says(loaded, inputs), expected, atol=1e-4 if name == "exact" else 0, rtol=0)
        assert (tmp_path / name / "preprocessor_config.json").read_text() == '{"image_mean": [0.5], "of": "the eye"}'


def test_a_processor_loads_from_what_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qwen2_audio().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>"]})
    ear = tf.WhisperFeatureExtractor(feature_size=8)
    tf.Qwen2AudioProcessor(ear, tokenizer).save_pretrained(tmp_path / "model")
    eckart.compress(str(tmp_path / "model"), recipe="svd", keep=0.7, out=tmp_path / "out")
    before, after = (tf.AutoProcessor.from_pretrained(tmp_path / name) for name in ("model", "out"))
    sound = noise(16000).numpy()
    one, other = (p(text="<|AUDIO|>", audio=sound, sampling_rate=16000, return_tensors="pt") for p in (before, after))
    assert type(before) is type(after) is tf.Qwen2AudioProcessor
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


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
