"""What people do with a model of transformers works on one with factors: the tools take it as their own."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import NEWER
from mixed import mixed

from eckart.checkpoints import checkpoint
from eckart.engines import adapters
from eckart.errors import OptionError, UserError
from eckart.portable import hf
from eckart.portable.linear import is_factorized, share_basis_

AUTO = transformers.AutoModelForCausalLM
Make = Callable[..., Any]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama with every storage form, in shards, with its tokenizer."""
    from eckart.testing import tiny_tokenizer

    path = tmp_path_factory.mktemp("tools") / "saved"
    checkpoint.save(mixed("llama-tied"), path, tokenizer=tiny_tokenizer(), max_shard_size="30KB")
    return path


def devices(offloaded: set[int]) -> dict[str, str]:
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return rest | {f"model.layers.{i}": "disk" if i in offloaded else "cpu" for i in (0, 1)}


@pytest.mark.parametrize("offloaded", [{1}, {0, 1}])
def test_disk_offload_with_a_shared_basis(offloaded: set[int], folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    specs = hf.specs_of(AUTO.from_pretrained(folder))
    assert any(".1." in name and ".0." in spec.get("basis_of", "") for name, spec in specs.items())
    model = AUTO.from_pretrained(folder, device_map=devices(offloaded), offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())  # or nothing was offloaded
    assert torch.equal(logits(model, ids), logits(AUTO.from_pretrained(folder), ids))
    with pytest.raises(ValueError, match="is offloaded"):
        model.dequantize()


def test_an_owner_on_disk_with_its_reader_in_memory_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\..*reads the basis of .*layers\.0\..*, which is on disk"):
        AUTO.from_pretrained(folder, device_map=devices({0}), offload_folder=tmp_path / "offload")


def test_a_device_map_chosen_by_transformers(folder: Path, ids: torch.Tensor) -> None:
    model = AUTO.from_pretrained(folder, device_map="auto")
    assert torch.equal(logits(model, ids), logits(mixed("llama-tied"), ids))


def test_tied_embeddings_stay_tied(folder: Path) -> None:
    model = AUTO.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_dtype_at_loading_and_afterwards(folder: Path, ids: torch.Tensor) -> None:
    loaded = AUTO.from_pretrained(folder, dtype=torch.bfloat16)
    moved = AUTO.from_pretrained(folder).to(torch.bfloat16)
    for model in (loaded, moved):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert {b.dtype for n, b in model.named_buffers() if n.endswith(("index", "column_order"))} == {torch.int32}
        specs = hf.specs_of(model)
        assert specs == hf.specs_of(AUTO.from_pretrained(folder))  # the shared basis is still shared
    for (name, one), (_, other) in zip(loaded.named_parameters(), moved.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_deep_copy_is_the_same_and_its_own(folder: Path, ids: torch.Tensor) -> None:
    model = AUTO.from_pretrained(folder)
    before, twin = logits(model, ids), copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), before)
    assert hf.specs_of(twin) == hf.specs_of(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model, ids), before)


def test_pipeline(folder: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(folder))
    text = pipe("Brown cow", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("Brown cow")
    assert type(pipe.model) is transformers.LlamaForCausalLM
    assert any(is_factorized(module) for module in pipe.model.modules())


def step(model: Any, ids: torch.Tensor, folder: Path) -> None:
    """One step of the Trainer on two windows."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=1, learning_rate=0.01, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_the_trainer_moves_the_factors(folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    model = AUTO.from_pretrained(folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step(model, ids, tmp_path)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if "basis" in name)
    model.eval().save_pretrained(tmp_path / "trained")
    again = AUTO.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert hf.specs_of(again) == hf.specs_of(AUTO.from_pretrained(folder))


# PEFT

TARGETS = {
    "all-linear": "all-linear",
    "the factors of some layers": r".*\.(q_proj|v_proj)\.(basis|coefficients)",
    "layers by the name they had": ["q_proj", "v_proj", "down_proj"],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for PEFT's ways
@pytest.mark.parametrize("targets", TARGETS)
def test_lora(targets: str, folder: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=TARGETS[targets], r=2)
    if isinstance(TARGETS[targets], list):
        config = adapters.lora(config)
    base = AUTO.from_pretrained(folder)
    before = logits(base, ids)
    model = peft.get_peft_model(base, config)
    assert torch.equal(logits(model, ids), before)  # B starts at zero
    step(model, ids, tmp_path)
    trained = logits(model.eval(), ids)
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AUTO.from_pretrained(folder), tmp_path / "adapter", config=config)
    assert torch.equal(logits(again.eval(), ids), trained)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_beside_a_layer_is_the_sum(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AUTO.from_pretrained(folder)
    config = adapters.lora(peft.LoraConfig(target_modules=["down_proj"], r=2, lora_alpha=4, init_lora_weights=False))
    dense = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    layer = peft.get_peft_model(model, config).base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features)
    b, a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (dense + 4 / 2 * b @ a).T)
    with pytest.raises(UserError, match="cannot be merged"):
        layer.merge()


def test_lora_that_needs_a_dense_weight_is_refused() -> None:
    peft = pytest.importorskip("peft")
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(OptionError, match="needs a dense weight"):
            adapters.lora(peft.LoraConfig(target_modules=["q_proj"], **options))


# Tensor parallelism

needs_parallel = pytest.mark.skipif(not NEWER, reason="transformers 5.23 brought the plan that factors are split by")


def plan_of(model: Any) -> dict[str, str]:
    return {name: style for name, style in model.tp_plan.items() if "layers" in name}


@needs_parallel
def test_the_plan_splits_the_factors(make: Make, tmp_path: Path) -> None:
    dense = plan_of(make("llama", share=None))
    checkpoint.save(make("llama"), tmp_path / "saved")
    plan = plan_of(AUTO.from_pretrained(tmp_path / "saved"))
    for name, style in dense.items():
        factor = {"colwise": "coefficients", "rowwise": "basis"}[style]
        assert plan[f"{name}.{factor}"] == style
        assert plan[name] == f"eckart_{style}"
    assert len(plan) == 2 * len(dense)


SPLIT = """
import sys, eckart, torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
ids = torch.arange(4, 20)[None]
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
local = {name: tuple(getattr(p, "to_local", lambda: p)().shape) for name, p in model.named_parameters()}
assert local["model.layers.0.self_attn.q_proj.coefficients.weight"] == (16, 16), local
assert local["model.layers.0.self_attn.q_proj.basis.weight"] == (16, 32), local
assert local["model.layers.0.mlp.down_proj.basis.weight"] == (16, 32), local
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[2], distributed_config=DistributedConfig(tp_size=2))
except ValueError as error:
    print(f"refused: {error}", flush=True)
dist.destroy_process_group()
"""


@needs_parallel
@pytest.mark.slow
def test_two_processes_split_a_model(make: Make, folder: Path, tmp_path: Path) -> None:
    model, dense = make("llama-bias"), make("llama-bias", share=None)
    model.model.layers[1].mlp.up_proj = dense.model.layers[1].mlp.up_proj  # dense beside pairs of one name
    share_basis_(*(model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1)))
    checkpoint.save(model, tmp_path / "saved")
    (tmp_path / "split.py").write_text(SPLIT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, tmp_path / "split.py", tmp_path / "saved", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(said) == 2
    assert "layers.0." in said[0]
    assert "cannot be split by 'colwise'; only 'pair' can" in said[0]


def test_lora_without_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", None)
    with pytest.raises(UserError, match=r"^LoRA on factorised layers needs PEFT: pip install peft\.$"):
        adapters.lora(object())  # type: ignore[arg-type]


@needs_parallel
def test_a_layer_that_devices_cannot_share_is_named(tmp_path: Path) -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    checkpoint.save(mixed("llama"), tmp_path / "saved")
    model = AUTO.from_pretrained(tmp_path / "saved")
    style = ALL_PARALLEL_STYLES["eckart_colwise"]
    whole = {n: m for n, m in model.named_modules() if is_factorized(m) and not m.divisible}
    assert {module.spec()["storage"] for module in whole.values()} == {"columns", "pivoted"}
    for name, module in whole.items():
        words = rf"^{name}: a layer of storage '(pivoted|columns)' cannot be split by 'colwise'; only 'pair' can, "
        with pytest.raises(ValueError, match=words) as caught:
            style.shard_param(module, "weight", None)
        assert str(caught.value).isprintable()
