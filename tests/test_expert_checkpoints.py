"""Checkpoints with factorised experts: saved, sharded, saved again, loaded by every door, refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES
from test_factorized_experts import cut_
from transformers import AutoModelForCausalLM

import eckart
from eckart.checkpoints import checkpoint, code
from eckart.checkpoints.conversion import convert
from eckart.engines.exporting import export
from eckart.errors import CheckpointError, ModelError, PlanError
from eckart.plans import resolve
from eckart.portable.experts import check_stack
from eckart.portable.hf import EckartConfig, specs_of
from eckart.types import Entry

RANKS = (5, None, 9, 5)


@pytest.fixture
def saved(tmp_path, request, tokenizer):
    """A folder and what its model computes: ragged ranks, an expert and a layer left dense."""

    def make(family, **options):
        model = MIXTURES[family]()
        storage = options.pop("storage", "pair")
        cut_(model, lambda t: RANKS[t.expert] if (t.block, t.kind[-9:]) != (1, "down_proj") else None, storage)
        eckart.save(model, tmp_path / family, tokenizer=tokenizer, **options)
        return tmp_path / family, model

    return make


def logits(model):
    ids = torch.randint(4, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def same(one, other):
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in mine.items())


@pytest.mark.parametrize(
    ("family", "storage"), [*((family, "pair") for family in MIXTURES), ("mixtral", "pivoted"), ("gpt-oss", "pivoted")]
)
def test_every_door_gives_it_back_bit_for_bit_also_when_saved_again(saved, family, storage, tmp_path):
    folder, model = saved(family, storage=storage)
    first = eckart.load(folder)
    assert same(first, model)
    assert torch.equal(logits(first), logits(model))
    native = AutoModelForCausalLM.from_pretrained(folder)
    assert same(native, model)
    native.save_pretrained(tmp_path / "again")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert same(twice, model)
    assert specs_of(twice) == specs_of(model)
    prompt = torch.arange(5, 12)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(twice.generate(prompt, use_cache=True, **options), expected)


def test_sharded_it_is_the_same(saved):
    folder, model = saved("mixtral", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert same(eckart.load(folder), model)


ALONE = """
import sys, torch, transformers
class Gone:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "eckart":
            raise ImportError(name)
sys.meta_path.insert(0, Gone())
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    assert "mismatch" in str(error), error
else:
    raise SystemExit("a dense model was drawn at random")
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(folder + "-again")
    torch.save((dict(model.named_parameters()), model(torch.arange(5, 30)[None]).logits), folder + "/said.pt")
"""


def test_without_the_package_its_own_code_reads_it(saved):
    made = {"qwen3-moe": saved("qwen3-moe"), "gpt-oss": saved("gpt-oss", storage="pivoted")}
    folders = [str(folder) for folder, _ in made.values()]
    assert (Path(folders[0]) / "experts.py").is_file()
    subprocess.run([sys.executable, "-c", ALONE, *folders], check=True)
    for folder, model in made.values():
        parameters, said = torch.load(folder / "said.pt")
        assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
        with torch.no_grad():
            assert torch.equal(model(torch.arange(5, 30)[None]).logits, said)
        assert same(AutoModelForCausalLM.from_pretrained(f"{folder}-again"), model)


def test_files_hold_factors_and_no_stack(saved):
    from safetensors import safe_open

    folder, _ = saved("qwen3-moe")
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    at = "model.layers.0.mlp.experts.gate_up_proj"
    assert shapes[f"{at}.rank_5.basis"] == [2, 5, 32]
    assert shapes[f"{at}.rank_5.coefficients"] == [2, 32, 5]
    assert shapes[f"{at}.dense.weight"] == [1, 32, 32]
    assert shapes["model.layers.0.mlp.experts.down_proj"] == [0]  # the guard
    assert at not in shapes
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"][at]
    assert entry == {"storage": "experts", "of": "pair", "ranks": [5, 0, 9, 5]}


def test_on_disk_and_in_half_precision(saved, tmp_path):
    folder, model = saved("qwen3-moe")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "off")
    assert torch.equal(logits(spread), logits(model))
    half = eckart.load(folder, dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.experts.gate_up_proj.rank_5.basis.dtype == torch.bfloat16
    assert torch.isfinite(logits(half)).all()


def test_multiplied_out_it_is_an_ordinary_folder(saved, tmp_path):
    folder, model = saved("gpt-oss")
    made = convert(folder, storage="dense", out=tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not specs_of(dense)
    torch.testing.assert_close(logits(dense), logits(model))
    assert made.ledger.keep == 1
    pivoted = convert(folder, storage="pivoted", out=tmp_path / "pivoted")
    assert set(pivoted.left.values()) == {"is a stack of experts, which is only changed to dense"}
    assert same(eckart.load(tmp_path / "pivoted"), model)


def test_a_plan_has_to_be_what_the_stacks_are():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    specs = {name: {"storage": "experts", "of": "pair", "ranks": [5, 0, 5, 5]}}
    assert set(checkpoint.layer_specs(specs)) == {f"{name}.{e}" for e in (0, 2, 3)}
    own = eckart.Plan((Entry(tuple(f"{name}.{e}" for e in (0, 2, 3)), 5, own_bases=True),))
    shared = eckart.Plan((Entry(tuple(f"{name}.{e}" for e in (0, 2, 3)), 5),))
    assert checkpoint._difference(own, specs) == ""
    assert "basis of" in checkpoint._difference(shared, specs)
    assert eckart.Plan.from_dict(own.to_dict()) == own


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"storage": "experts"}, "ranks is None, not a list"),
        ({"storage": "experts", "of": "pair", "ranks": [5, 0, 9]}, "must be 4 whole numbers"),
        ({"storage": "experts", "of": "pair", "ranks": [5, 0, 9, 33]}, "must be 4 whole numbers"),
        ({"storage": "experts", "of": "columns", "ranks": [5, 0, 9, 5]}, "of is 'columns', but experts are stacks of"),
        ({"storage": "experts", "ranks": [5, 0, 9, "5"]}, "must be a text or a whole number"),
        ({"storage": "pair", "rank": 5}, "is a stack of experts, so its storage"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_by_name(saved, entry, said):
    folder, _ = saved("qwen3-moe")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.experts.gate_up_proj"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ValueError), match=said):
        eckart.load(folder, verify=False)


def test_a_damaged_index_is_refused_by_name(saved):
    _, model = saved("qwen3-moe", storage="pivoted")
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    check_stack(stack)
    stack.rank_5.index[0, 1] = stack.rank_5.index[0, 0]
    with pytest.raises(ValueError, match=r"rank_5\.index must hold every number below 32 once"):
        check_stack(stack)


def test_experts_of_one_stack_have_one_storage():
    model = MIXTURES["qwen3-moe"]()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    plan = eckart.Plan((Entry((f"{name}.0",), 5), Entry((f"{name}.2",), 5, "pivoted")))
    with pytest.raises(PlanError, match=r"gate_up_proj\.2: storage 'pivoted' in the plan, but other experts of its"):
        resolve(plan, eckart.discover(model).targets)


def test_a_stack_where_there_is_none_is_refused():
    from eckart.portable.hf import _put_empty_

    model = MIXTURES["qwen3-moe"]()
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: named in quantization_config, but it is no stack"):
        _put_empty_(model, "model.layers.0.self_attn.q_proj", {"storage": "experts", "ranks": [1]})


def test_experts_are_refused_by_name_where_they_would_be_spread_over_devices(saved):
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    folder, _ = saved("mixtral")
    model = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    style = ALL_PARALLEL_STYLES[model.tp_plan["model.layers.*.mlp.experts.gate_up_proj"]]
    said = rf"^{name}: factorised experts cannot be spread over devices yet; load without a parallel plan\.$"
    with pytest.raises(ValueError, match=said):
        style.install_forward(model.get_submodule(name), None)
    with pytest.raises(ValueError, match=said.replace("gate_up", r"\w+")):
        style.shard_param(model.model.layers[0].mlp.experts, "down_proj", None)


def test_graphs_are_refused_by_name(saved, tmp_path):
    folder, _ = saved("qwen3-moe")
    with pytest.raises(ModelError, match=r"gate_up_proj|down_proj"):
        export(folder, to="onnx", out=tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_the_code_names_its_storages_also_where_only_experts_are_factorised(saved):
    folder, _ = saved("qwen3-moe")
    assert "pair" in (folder / code.INDEX).read_text()
    assert (folder / "base.py").is_file()
    assert EckartConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"]).guard == (
        "model.layers.0.mlp.experts.down_proj"
    )
