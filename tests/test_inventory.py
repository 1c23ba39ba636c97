"""On the plain road too, transformers' own `from_pretrained`, a checkpoint loads whole or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import eckart
from eckart.checkpoints import checkpoint
from eckart.model.factorise import store_
from eckart.portable import hf

Make = Callable[..., Any]
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(make: Make, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint with pairs and, in its first block, a pivoted layer."""
    model = make("llama")
    store_(model, Q0, "pivoted")
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    return tmp_path / "saved"


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def modules(folder: Path) -> Callable[[Callable[[dict[str, Any]], Any]], None]:
    return lambda change: config(folder, lambda data: change(data["quantization_config"]["modules"]))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a factor is gone": (
        lambda f: tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.basis.weight")),
        r"up_proj\.basis\.weight: is missing",
    ),
    "an index is gone": (lambda f: tensors(f, lambda t: t.pop(f"{Q0}.index")), r"q_proj\.index: is missing"),
    "a norm is gone": (lambda f: tensors(f, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight: is missing"),
    "the head is gone": (lambda f: tensors(f, lambda t: t.pop("lm_head.weight")), r"lm_head\.weight: is missing"),
    "an index repeats": (
        lambda f: tensors(f, lambda t: t[f"{Q0}.index"].fill_(1)),
        r"index must hold every number below \d+ once",
    ),
    "an index is out of range": (
        lambda f: tensors(f, lambda t: t[f"{Q0}.index"].add_(1)),
        r"index must hold every number",
    ),
    "an index of another dtype": (
        lambda f: tensors(f, lambda t: t.update({f"{Q0}.index": t[f"{Q0}.index"].float()})),
        r"index: is stored as F32, but must be I32",
    ),
    "a factor of whole numbers": (
        lambda f: tensors(f, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if "v_proj.basis" in k})),
        r"v_proj\.basis\.weight: is stored as I8",
    ),
    "a factor of another shape": (
        lambda f: tensors(f, lambda t: t.update({k: v[:2].clone() for k, v in t.items() if "v_proj.basis" in k})),
        r"v_proj\.basis\.weight: is \[2, 32\] in the weight files, but must be",
    ),
    "a block more": (lambda f: config(f, lambda c: c.update(num_hidden_layers=3)), r"3 entries by config.*but 2"),
    "a block less": (
        lambda f: (
            config(f, lambda c: c.update(num_hidden_layers=1)),
            modules(f)(lambda m: [m.pop(k) for k in [*m] if ".1." in k]),
        ),
        r"1 entries by config.*but 2",
    ),
    "the head named among the layers": (
        lambda f: modules(f)(lambda m: m.update({"lm_head": {"storage": "pair", "rank": 4}})),
        r"lm_head\.basis\.weight: is missing",
    ),
    "a layer that is not there": (
        lambda f: modules(f)(lambda m: m.update({"model.layers.9.x": {"storage": "pair", "rank": 4}})),
        r"model\.layers\.9\.x: named in quantization_config, but LlamaForCausalLM has no such layer",
    ),
    "a layer that is not named": (
        lambda f: modules(f)(lambda m: m.pop("model.layers.1.mlp.up_proj")),
        r"up_proj: is factorised in the weight files, but not named",
    ),
    "another rank": (lambda f: modules(f)(lambda m: m[Q0].update(rank=5)), r"in the weight files, but must be"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_whole_is_refused_by_name(damage: str, folder: Path) -> None:
    make, words = DAMAGE[damage]
    make(folder)
    with pytest.raises(ValueError, match=words):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_columns_rise_in_both_parts(tmp_path: Path) -> None:
    old = tmp_path / "columns"
    shutil.copytree(Path(__file__).parent / "data" / "checkpoints" / "columns", old)
    key = next(key for key in load_file(old / "model.safetensors") if key.endswith("column_order"))
    tensors(old, lambda t: t.update({key: t[key].flip(0)}))
    with pytest.raises(ValueError, match="column_order must rise"):
        transformers.AutoModelForCausalLM.from_pretrained(old)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt", "gpt-neox"])
def test_whole_checkpoints_pass(family: str, make: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(family)
    checkpoint.save(model, tmp_path / "saved", max_shard_size="20KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt", "qwen3"])
@pytest.mark.parametrize("shared", [False, True])
def test_an_embedder_opens_it_without_its_head(
    family: str, shared: bool, make: Make, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = make(family, shared_basis=shared) if family == "llama" else make(family)
    checkpoint.save(model, tmp_path / "saved")
    base = transformers.AutoModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(base(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "again")  # and what it saves can be read by either door
    for opened in (transformers.AutoModel.from_pretrained(tmp_path / "again"), eckart.load(tmp_path / "again")):
        with torch.no_grad():
            assert torch.equal(opened(ids).last_hidden_state, expected)


def test_another_head_is_new_and_the_rest_is_not(make: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make("llama")
    checkpoint.save(model, tmp_path / "saved")
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", num_labels=2, pad_token_id=0
    )
    with torch.no_grad():
        assert torch.equal(judge.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_another_head_does_not_hide_what_is_missing(folder: Path) -> None:
    tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"norm\.weight: is missing"):
        transformers.AutoModel.from_pretrained(folder)


def test_its_own_code_refuses_too(folder: Path) -> None:
    """The files that travel hold the same checks."""
    names = {path.name for path in folder.glob("*.py")}
    assert {"hf.py", "inventory.py", "modeling_eckart.py", "pivoted.py"} <= names
    assert (folder / "inventory.py").read_bytes() == (Path(hf.__file__).parent / "inventory.py").read_bytes()


@pytest.mark.skipif(not hasattr(transformers, "ExaoneConfig"), reason="this transformers has no such family")
def test_a_family_whose_tensors_are_renamed_within_blocks(ids: torch.Tensor, tmp_path: Path) -> None:
    from conftest import factorize_all_

    from eckart.testing import tiny_model

    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    model = factorize_all_(tiny_model("Exaone", lm_head="LlamaForCausalLM", **options))
    checkpoint.save(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert "model.layers.0.mlp.down_proj.basis.weight" not in stored  # it has another name there
    assert torch.equal(eckart.load(tmp_path / "saved")(ids).logits, model(ids).logits)
    tensors(tmp_path / "saved", lambda t: t.pop(next(key for key in t if key.endswith("coefficients.weight"))))
    with pytest.raises(ValueError, match=r"coefficients\.weight: is missing"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
