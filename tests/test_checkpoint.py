"""A checkpoint comes back as it was saved, bit for bit, or not at all."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eckart.checkpoints import checkpoint
from eckart.errors import CheckpointError, ModelError, OutputError, PlanError
from eckart.plans.plan import Plan
from eckart.portable import hf
from eckart.storages.pair import FactorizedLinear
from eckart.testing import tiny_models
from eckart.types import Entry

Make = Callable[..., Any]
FAMILIES = sorted(tiny_models())
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
PROVENANCE = {"model": {"source": "tiny"}, "recipe": {"name": "by hand"}}


def plan_of(model: Any) -> Plan:
    """The plan that says what a model already is."""
    groups: dict[str, list[str]] = {}
    specs = hf.specs_of(model)
    for name, spec in specs.items():
        groups.setdefault(spec.get("basis_of", name), []).append(name)
    return Plan(tuple(Entry(tuple(names), specs[owner]["rank"]) for owner, names in groups.items()))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits
    return result


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the files, of whichever shard."""
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.fixture
def saved(make: Make, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint of a factorised tiny Llama in three or more shards."""
    model = make("llama")
    checkpoint.save(
        model,
        tmp_path / "saved",
        tokenizer=tokenizer,
        plan=plan_of(model),
        provenance=PROVENANCE,
        max_shard_size="30KB",
    )
    return tmp_path / "saved"


# What comes back


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family: str, make: Make, tokenizer: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(family)
    before = logits(model, ids)
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer, plan=plan_of(model), provenance=PROVENANCE)
    loaded = checkpoint.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits(loaded, ids), before)
    assert torch.equal(logits(model, ids), before)
    assert hf.specs_of(loaded) == hf.specs_of(model)
    assert os.listdir(tmp_path) == ["saved"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_dense_logits(family: str, make: Make, ids: torch.Tensor) -> None:
    dense, full, half = (logits(make(family, share), ids) for share in (None, 1.0, 0.5))
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
    assert float((half - dense).abs().max()) > 0.1  # or the test above could not fail


@pytest.mark.parametrize("shards", ["30KB", "5GB"])
def test_a_shared_basis_is_written_once_and_comes_back_tied(
    make: Make, ids: torch.Tensor, tmp_path: Path, shards: str
) -> None:
    model = make("llama", shared_basis=True)
    checkpoint.save(model, tmp_path / "a", plan=plan_of(model), max_shard_size=shards)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["quantization_config"]["modules"][Q1] == {"storage": "pair", "rank": 16, "basis_of": Q0}
    written = tensors(tmp_path / "a")
    assert f"{Q0}.basis.weight" in written
    assert f"{Q1}.basis.weight" not in written
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.get_submodule(Q1).basis.weight is loaded.get_submodule(Q0).basis.weight
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    checkpoint.save(copy.deepcopy(loaded), tmp_path / "b", plan=plan_of(model), max_shard_size=shards)
    first, again = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt"])
def test_saving_again_writes_the_same_bytes(family: str, make: Make, tmp_path: Path) -> None:
    checkpoint.save(make(family), tmp_path / "a", provenance=PROVENANCE)
    loaded = checkpoint.load(tmp_path / "a")
    checkpoint.save(loaded, tmp_path / "b", provenance=PROVENANCE)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    loaded.save_pretrained(tmp_path / "c")  # the same but for the code
    assert "auto_map" not in json.loads((tmp_path / "c/config.json").read_text())
    edit_json(tmp_path / "a/config.json", lambda config: config.pop("auto_map"))
    edit_json(tmp_path / "c/config.json", lambda config: None)  # written the same way
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name
    assert hf.specs_of(checkpoint.load(tmp_path / "c")) == hf.specs_of(loaded)  # without provenance, too


def test_small_shards_are_indexed_and_all_fingerprinted(saved: Path, make: Make, ids: torch.Tensor) -> None:
    shards = sorted(path.name for path in saved.glob("*.safetensors"))
    assert len(shards) >= 3
    provenance = checkpoint.read_provenance(saved)
    assert sorted(name for name in provenance["files"] if name.endswith("safetensors")) == shards
    everything = {path.name for path in saved.iterdir()} - {"provenance.json", "README.md"}
    assert set(provenance["files"]) == everything
    assert provenance["model"] == PROVENANCE["model"]
    assert {"eckart", "torch", "transformers", "python"} <= set(provenance["versions"])
    assert torch.equal(logits(checkpoint.load(saved), ids), logits(make("llama"), ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_kept_and_can_be_overridden(
    dtype: torch.dtype, make: Make, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = make("llama")
    for parameter in model.parameters():  # not model.to(dtype), which rounds the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    checkpoint.save(model, tmp_path / "saved")
    loaded = checkpoint.load(tmp_path / "saved", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    wide = checkpoint.load(tmp_path / "saved", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(logits(wide, ids), logits(model.to(torch.float32), ids))


def test_tokenizer_template_and_generation_config_survive(make: Make, tokenizer: Any, tmp_path: Path) -> None:
    model = make("llama")
    model.generation_config.max_new_tokens = 7
    checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer)
    again = checkpoint.load_tokenizer(tmp_path / "saved")
    chat = [{"role": "user", "content": "How now?"}]
    assert again("Brown cow.").input_ids == tokenizer("Brown cow.").input_ids
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")
    assert checkpoint.load(tmp_path / "saved").generation_config.max_new_tokens == 7


def test_whoever_may_read_the_folder_may_read_its_files(make: Make, tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        checkpoint.save(make("llama"), tmp_path / "saved", provenance=PROVENANCE)
    finally:
        os.umask(earlier)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o640}


def test_plan_comes_back(saved: Path, make: Make) -> None:
    assert checkpoint.read_plan(saved) == plan_of(make("llama"))


def test_a_dense_model_is_a_plain_folder(make: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make("llama", share=None)
    checkpoint.save(model, tmp_path / "saved", plan=Plan((Entry((Q0,), None),)), provenance=PROVENANCE)
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for loaded in (checkpoint.load(tmp_path / "saved"), checkpoint.load_model(str(tmp_path / "saved")), plain):
        assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_model_with_some_layers_dense(make: Make, ids: torch.Tensor, tmp_path: Path) -> None:
    model, dense = make("gpt2"), make("gpt2", share=None)
    model.transformer.h[1] = dense.transformer.h[1]
    checkpoint.save(model, tmp_path / "saved", plan=plan_of(model))
    assert torch.equal(logits(checkpoint.load(tmp_path / "saved"), ids), logits(model, ids))


def test_transformers_loads_it_once_eckart_is_imported(saved: Path, ids: torch.Tensor) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(loaded, ids), logits(checkpoint.load(saved), ids))
    assert torch.equal(logits(checkpoint.load_model(str(saved)), ids), logits(loaded, ids))


def test_a_loaded_model_trains(saved: Path, ids: torch.Tensor) -> None:
    model = checkpoint.load(saved).train()
    model(ids, labels=ids).loss.backward()
    layer = model.get_submodule(Q0)
    assert isinstance(layer, FactorizedLinear)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_skeleton_has_the_structure_and_no_memory(saved: Path, make: Make) -> None:
    built = checkpoint.skeleton(str(saved))
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert hf.specs_of(built) == hf.specs_of(make("llama"))
    assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in make("llama").parameters())


# What a stranger meets


@pytest.mark.slow
def test_without_eckart_a_plain_load_fails(saved: Path) -> None:
    code = """
import sys, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print("refused", "eckart" in sys.modules, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
    assert done.stdout.startswith("refused False "), done.stderr
    assert "mismatch" in done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_quantizer_no_family_loads(
    family: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(make(family), tmp_path / "saved")
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "eckart")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_eckart_imports_no_transformers() -> None:
    code = "import sys, eckart, eckart.checkpoint; assert not {'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def default_chatter() -> Iterator[None]:
    """transformers as it talks in a fresh process."""
    from transformers.utils import logging as chatter

    chatter.enable_progress_bar()
    chatter.set_verbosity_warning()
    yield
    assert chatter.is_progress_bar_enabled()
    assert chatter.get_verbosity() == logging.WARNING


@pytest.mark.usefixtures("default_chatter")
def test_saving_and_loading_print_nothing(make: Make, tokenizer: Any, tmp_path: Path, capfd: Any) -> None:
    checkpoint.save(make("gpt2"), tmp_path / "saved", tokenizer=tokenizer)
    checkpoint.load(tmp_path / "saved")
    checkpoint.load_tokenizer(tmp_path / "saved")
    checkpoint.skeleton(str(tmp_path / "saved"))
    with pytest.raises(ModelError):
        checkpoint.load_model("nobody/no-such-model")
    assert capfd.readouterr() == ("", "")


def test_importing_hf_twice_registers_once() -> None:
    import importlib

    importlib.reload(hf)
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["eckart"].__name__ == "EckartQuantizer"


# What is damaged


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def modules(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["modules"]
    return found


def shard_with(folder: Path, key: str) -> Path:
    name: str = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]
    return folder / name


def truncate(folder: Path) -> None:
    path = shard_with(folder, f"{Q0}.basis.weight")
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(folder: Path) -> None:
    path = shard_with(folder, f"{Q0}.basis.weight")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_a_shard(folder: Path) -> None:
    shard_with(folder, f"{Q0}.basis.weight").unlink()


def forget(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def lose_a_tensor(folder: Path) -> None:
    key = f"{Q0}.coefficients.weight"
    path = shard_with(folder, key)
    with safe_open(path, "pt") as file:
        rest = {k: file.get_tensor(k) for k in file.keys() if k != key}  # noqa: SIM118
    save_file(rest, path, {"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    path = shard_with(folder, f"{Q0}.basis.weight")
    save_file({**load_file(path), "model.extra": torch.zeros(1)}, path, {"format": "pt"})


def edit_config(change: Callable[[dict[str, Any]], object], *lost: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_json(folder / "config.json", change)
        forget(folder, *lost)

    return damage


def edit_plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "plan.json", change)


def also(damage: Callable[[Path], None], *lost: str) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        damage(folder)
        forget(folder, *lost)

    return both


def as_if_quantized_twice(config: dict[str, Any]) -> None:
    modules(config)["model.embed_tokens"] = {"storage": "pair", "rank": 1}


P, N = "plan.json", "provenance.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"model-0000\d-of-\d+.safetensors: is damaged \(.*\); copy or download it again"),
    "flipped byte": (flip_a_byte, r"safetensors: is not what was saved, by its size or hash in .*; copy or download"),
    "lost shard": (lose_a_shard, r"of-\d+.safetensors: is missing, though model.safetensors.index.json names it"),
    "lost index": (lambda f: forget(f, "model.safetensors.index.json"), "holds no weights"),
    "lost tensor": (lose_a_tensor, "safetensors: is not what was saved"),
    "lost tensor, no provenance": (also(lose_a_tensor, N), rf"{Q0}.coefficients.weight: is missing from the weight"),
    "added tensor, no provenance": (also(add_a_tensor, N), "model.extra is in the files but not in the model"),
    "rank, plan": (edit_config(lambda c: modules(c)[Q0].update(rank=9)), rf"plan.json: contradicts .*{Q0} is rank 16"),
    "rank": (
        edit_config(lambda c: modules(c)[Q0].update(rank=9), P, N),
        rf"{Q0}.basis.weight: is \[16, 32\] in the weight files, but must be \[9, 32\]",
    ),
    "rank 0": (edit_config(lambda c: modules(c)[Q0].update(rank=0), P, N), rf"{Q0}: rank is 0"),
    "storage": (edit_config(lambda c: modules(c)[Q0].update(storage="folded"), P, N), f"{Q0}: storage is 'folded'"),
    "layer taken out": (edit_config(lambda c: modules(c).pop(Q1), P, N), f"{Q1}: is factorised in the weight files"),
    "no such layer": (
        edit_config(lambda c: modules(c).update({"model.x": {"storage": "pair"}}), P, N),
        "no such layer",
    ),
    "not a linear": (edit_config(as_if_quantized_twice, P, N), "model.embed_tokens: .* but it is a Embedding"),
    "newer format": (edit_config(lambda c: c["quantization_config"].update(format_version=2)), "format_version is 2"),
    "no modules": (edit_config(lambda c: c["quantization_config"].update(modules={})), "at least one layer"),
    "bad spec": (edit_config(lambda c: modules(c).update({Q0: 3})), r"modules\['model.layers.0.*'\] is 3"),
    "bad owner": (edit_config(lambda c: modules(c)[Q1].update(basis_of="model.x")), "basis_of is 'model.x'"),
    "own owner": (edit_config(lambda c: modules(c)[Q1].update(basis_of=Q1)), "not a layer that owns its basis"),
    "quantization_config taken out": (edit_config(lambda c: c.pop("quantization_config"), P), "config.json: is not"),
    "other quantization": (
        edit_config(lambda c: c["quantization_config"].update(quant_method="gptq")),
        "quant_method is 'gptq'",
    ),
    "not a checkpoint": (edit_config(lambda c: c.pop("quantization_config"), P, N), "not a checkpoint of eckart"),
    "plan of another rank": (
        edit_plan(lambda p: p["entries"][0].update(rank=1)),
        "contradicts config.json: .* rank 1,",
    ),
    "plan keeps dense": (
        edit_plan(lambda p: p["entries"][0].update(rank="dense")),
        "is dense in the plan, but rank 16",
    ),
    "plan names more": (
        edit_plan(lambda p: p["entries"].append({"targets": ["lm_head"], "rank": 3})),
        "lm_head is rank 3, .* in the plan, but dense in the model",
    ),
    "broken plan": (lambda f: (f / P).write_text("{"), "plan.json: cannot be read"),
    "broken provenance": (lambda f: (f / N).write_text("["), "provenance.json: cannot be read as JSON"),
    "broken config": (lambda f: (f / "config.json").write_text("[]"), "config.json: must hold a JSON object"),
    "no config": (lambda f: forget(f, "config.json"), "config.json: no such file"),
    "files renamed": (
        lambda f: edit_json(f / N, lambda d: d["files"].update({"other.safetensors": {"bytes": 1, "sha256": "0"}})),
        "weight files are not those that provenance.json names",
    ),
    "no folder": (shutil.rmtree, "config.json: no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, saved: Path) -> None:
    spoil, words = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_verification_can_be_left_out(saved: Path) -> None:
    flip_a_byte(saved)
    assert checkpoint.load(saved, verify=False) is not None


# What cannot be written


def test_a_plan_that_is_not_the_model_is_refused(make: Make, tmp_path: Path) -> None:
    model = make("llama")
    entries = plan_of(model).entries[1:]
    with pytest.raises(PlanError, match=rf"{Q0} is dense in the plan, but rank 16, storage 'pair', basis of {Q0} in"):
        checkpoint.save(model, tmp_path / "saved", plan=Plan(entries))
    assert os.listdir(tmp_path) == []


def test_an_occupied_folder_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(OutputError, match="exists and is not empty"):
        checkpoint.save(make("llama"), tmp_path)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_model_of_another_quantizer_is_refused(make: Make) -> None:
    model = make("llama")
    other = type("Other", (), {"quantization_config": type("Config", (), {"quant_method": "gptq"})()})
    model.hf_quantizer = other()
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM: is quantized by 'gptq'"):
        hf.attach_(model, hf.specs_of(model))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_too_little_room_is_seen_before_writing(make: Make, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(150_000))
    with pytest.raises(OutputError, match=r"needs about 0\.1 MB but the disk has 0\.1 MB free"):
        checkpoint.save(make("llama"), small_disk / "saved")
    assert os.listdir(small_disk) == ["ballast"]


@pytest.mark.parametrize("room", [8_000, 60_000, 90_000])
def test_a_disk_that_fills_up_leaves_nothing(
    room: int, make: Make, tokenizer: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 8 kB the configuration fits and the first shard does not, then the later ones, then the tokenizer."""
    monkeypatch.setattr("eckart.support.files.check_space", lambda path, needed: None)
    (small_disk / "ballast").write_bytes(bytes(200 * 1024 - room))
    with pytest.raises(OutputError, match="saved: the disk is full; nothing was kept"):
        checkpoint.save(make("llama"), small_disk / "saved", tokenizer=tokenizer, max_shard_size="30KB")
    assert os.listdir(small_disk) == ["ballast"]


# Dense models


@pytest.fixture
def dense(make: Make, tokenizer: Any, tmp_path: Path) -> Path:
    make("llama-tied", share=None).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def drop_from_weights(folder: Path, key: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[key]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_load_model_is_exact(dense: Path, make: Make, ids: torch.Tensor) -> None:
    loaded = checkpoint.load_model(str(dense))
    assert torch.equal(logits(loaded, ids), logits(make("llama-tied", share=None), ids))
    assert {p.dtype for p in checkpoint.load_model(str(dense), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


NO_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: forget(f, "config.json"), "has no config.json, so it is not the folder of a model"),
    "no weights": (lambda f: forget(f, "model.safetensors"), "holds no weights: neither model.safetensors nor"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), r"model.safetensors: is damaged \("),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), r"model.safetensors: is damaged \("),
    "missing weight": (
        lambda f: drop_from_weights(f, "model.layers.1.mlp.up_proj.weight"),
        "model.layers.1.mlp.up_proj.weight is missing from the files",
    ),
    "wrong shape": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(intermediate_size=48)),
        r"mlp.down_proj.weight is \[32, 64\] but must be \[32, 48\]",
    ),
    "unknown type": (lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="x")), "model type 'x'"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("damage", NO_MODELS)
def test_a_model_that_cannot_be_loaded_is_named(damage: str, dense: Path) -> None:
    spoil, words = NO_MODELS[damage]
    spoil(dense)
    with pytest.raises(ModelError, match=words) as caught:
        checkpoint.load_model(str(dense))
    assert str(dense) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_too_many_does_no_harm(dense: Path, make: Make, ids: torch.Tensor) -> None:
    path = dense / "model.safetensors"
    save_file({**load_file(path), "model.draft.weight": torch.zeros(2)}, path, {"format": "pt"})
    loaded = checkpoint.load_model(str(dense))
    assert torch.equal(logits(loaded, ids), logits(make("llama-tied", share=None), ids))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody/no-such-model", "nobody/no-such-model: no such folder, and no model can be read from the hub"),
        ("not a name", "not a name: no such folder"),
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "the name of the model is empty"),
        (__file__, "is a file; name the folder"),
    ],
)
def test_a_name_that_is_no_model(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        checkpoint.load_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer(dense: Path) -> None:
    forget(dense, "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(ModelError, match="no tokenizer can be read from it"):
        checkpoint.load_tokenizer(dense)
