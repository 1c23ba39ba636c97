"""Every family in every storage form comes back bit for bit: with the package, with the code of the checkpoint alone,
and, with neither, not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mixed import FAMILIES, mixed
from safetensors.torch import load_file, save_file

from eckart import storages
from eckart.checkpoints import checkpoint
from eckart.portable import hf, modeling_eckart
from eckart.portable.linear import is_factorized
from eckart.storages.pair import FactorizedLinear

AUTO = transformers.AutoModelForCausalLM
WITHOUT_PACKAGE = """
import json, os, sys
sys.modules["eckart"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
folder, families = sys.argv[1], sys.argv[2:]
result = {}
"""


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, in shards, with the ids and logits beside it."""
    folder = tmp_path_factory.mktemp("families")
    ids = torch.randint(4, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    for family in FAMILIES:
        model = mixed(family)
        checkpoint.save(model, folder / family, max_shard_size="60KB")
        again = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
        save_file({"ids": ids, "logits": logits(model, ids), "tokens": again}, folder / f"{family}.expected")
    return folder


def run(code: str, *arguments: object) -> dict[str, Any]:
    script = WITHOUT_PACKAGE + code + "\nprint(json.dumps(result))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def clean(info: dict[str, Any]) -> bool:
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_hold_every_storage_form(family: str) -> None:
    forms = {(s["storage"], s.get("pivots"), "basis_of" in s) for s in hf.specs_of(mixed(family)).values()}
    pair = {("pair", None, False), ("pair", None, True)}
    assert forms == pair | {("columns", None, False), ("pivoted", "rows", False), ("pivoted", "columns", False)}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_package(family: str, saved: Path, tmp_path: Path) -> None:
    expected = load_file(saved / f"{family}.expected")
    loaded, info = AUTO.from_pretrained(saved / family, output_loading_info=True)
    assert clean(info)
    assert type(loaded) is type(FAMILIES[family]())
    assert torch.equal(logits(loaded, expected["ids"]), expected["logits"])
    tokens = loaded.generate(expected["ids"][:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected["tokens"])
    loaded.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    again, info = AUTO.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert clean(info)
    assert torch.equal(logits(again, expected["ids"]), expected["logits"])
    assert hf.specs_of(again) == hf.specs_of(loaded)


@pytest.mark.slow
def test_with_the_code_of_the_checkpoint_alone(saved: Path, tmp_path: Path) -> None:
    code = """
for family in families:
    expected = load_file(f"{folder}/{family}.expected")
    found = {}
    for where in (f"{folder}/{family}", f"again/{family}"):  # as saved by us, and by the class that it gave
        model, info = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True, output_loading_info=True)
        found["clean"] = not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            found["equal"] = torch.equal(model(expected["ids"]).logits, expected["logits"])
        result[where] = {**found, "class": type(model).__name__}
        if where.startswith(folder):
            tokens = model.generate(expected["ids"][:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
            result[where]["tokens"] = torch.equal(tokens, expected["tokens"])
            model.save_pretrained(f"again/{family}", max_shard_size="60KB")
"""
    result = run(f"os.chdir({str(tmp_path)!r})" + code, saved, *FAMILIES)
    for family in FAMILIES:
        native = type(FAMILIES[family]()).__name__
        assert result[f"{saved}/{family}"] == {"clean": True, "equal": True, "tokens": True, "class": native}
        assert result[f"again/{family}"] == {"clean": True, "equal": True, "class": native}
        again = tmp_path / "again" / family
        assert (again / "config.json").read_bytes() == (saved / family / "config.json").read_bytes()
        expected = load_file(saved / f"{family}.expected")
        assert torch.equal(logits(checkpoint.load(again), expected["ids"]), expected["logits"])  # and here, native


@pytest.mark.slow
def test_with_neither_it_is_an_error(saved: Path) -> None:
    code = """
for family in families:
    try:
        AutoModelForCausalLM.from_pretrained(f"{folder}/{family}")
    except RuntimeError as error:
        result[family] = str(error)
"""
    result = run(code, saved, *FAMILIES)
    assert sorted(result) == sorted(FAMILIES)
    assert all("mismatch" in text for text in result.values())


# The code in the checkpoint

SOURCE = Path(modeling_eckart.__file__).parent
FILES = {f"{name}.py" for name in ("modeling_eckart", "experts", "hf", "hashes", "inventory", "linear")}
FILES |= {"tensor_parallel.py"}
FILES |= {f"{name}.py" for name in ("base", "pair", "columns", "pivoted")}


def code_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.py"))


def test_the_code_is_the_packages_own(saved: Path) -> None:
    """Byte for byte, but for the one file that names the storages of this checkpoint."""
    sources = {path.name: path for path in [*SOURCE.glob("*.py"), *Path(storages.__file__).parent.glob("*.py")]}
    assert set(code_of(saved / "llama")) == {*FILES, "storages.py"}
    for name in FILES:
        assert (saved / "llama" / name).read_bytes() == sources[name].read_bytes()
    config = json.loads((saved / "llama/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_eckart.LlamaConfig",
        "AutoModelForCausalLM": "modeling_eckart.LlamaForCausalLM",
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"


def test_the_code_needs_what_transformers_needs_and_no_more(saved: Path) -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    allowed = {"torch", "transformers", "safetensors", "typing_extensions", *sys.stdlib_module_names}
    names = code_of(saved / "llama")
    for name in names:
        assert set(get_imports(saved / "llama" / name)) <= allowed
        assert {f"{other}.py" for other in get_relative_imports(saved / "llama" / name)} <= set(names)


def test_trusted_code_beside_the_package_gives_the_packages_layers(saved: Path) -> None:
    expected = load_file(saved / "llama.expected")
    model = AUTO.from_pretrained(saved / "llama", trust_remote_code=True)
    assert type(model) is not transformers.LlamaForCausalLM
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert any(isinstance(module, FactorizedLinear) for module in model.modules())
    assert torch.equal(logits(model, expected["ids"]), expected["logits"])
    assert transformers.LlamaForCausalLM._auto_class is None
    assert type(AUTO.from_pretrained(saved / "llama")) is transformers.LlamaForCausalLM


def test_a_plain_save_names_no_code_that_is_not_there(saved: Path, tmp_path: Path) -> None:
    model = checkpoint.load(saved / "opt")
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert not list((tmp_path / "plain").glob("*.py"))
    checkpoint.save(model, tmp_path / "ours")
    assert code_of(tmp_path / "ours") == code_of(saved / "opt")
    for name in ("config.json", *code_of(saved / "opt")):
        assert (tmp_path / "ours" / name).read_bytes() == (saved / "opt" / name).read_bytes()


def test_a_model_saved_from_the_trusted_class_is_the_same(saved: Path, tmp_path: Path) -> None:
    model = AUTO.from_pretrained(saved / "qwen2", trust_remote_code=True)
    checkpoint.save(model, tmp_path / "ours", max_shard_size="60KB")
    assert code_of(tmp_path / "ours") == code_of(saved / "qwen2")
    for name in ("config.json", "generation_config.json", *code_of(saved / "qwen2")):
        assert (tmp_path / "ours" / name).read_bytes() == (saved / "qwen2" / name).read_bytes(), name
    expected = load_file(saved / "qwen2.expected")
    assert torch.equal(logits(checkpoint.load(tmp_path / "ours"), expected["ids"]), expected["logits"])


def test_a_dense_model_carries_no_code(tmp_path: Path) -> None:
    checkpoint.save(FAMILIES["llama"](), tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*.py"))


def test_names_that_are_no_classes_are_refused() -> None:
    for name in ("Nothing", "pipeline", "LlamaTokenizer"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_eckart, name)


# dequantize


@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "opt", "phi3"])
def test_dequantize_gives_the_merged_dense_model(family: str, saved: Path, tmp_path: Path) -> None:
    expected = load_file(saved / f"{family}.expected")
    model = AUTO.from_pretrained(saved / family)
    assert model.dequantize() is model
    dense = FAMILIES[family]()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in dense.state_dict().items()}
    assert not any(is_factorized(module) for module in model.modules())
    scale = float(expected["logits"].abs().max())
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], rtol=0, atol=1e-5 * scale)
    model.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert "quantization_config" not in config
    plain, info = AUTO.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert clean(info)
    assert torch.equal(logits(plain, expected["ids"]), logits(model, expected["ids"]))


def test_dequantize_into_another_dtype(saved: Path) -> None:
    model = AUTO.from_pretrained(saved / "llama").dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
