"""Plans in few bits, from the request to a saved model and back; and what is refused."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from mixtures import MIXTURES

import eckart
from eckart import ledger, recipes
from eckart.checkpoints import checkpoint
from eckart.engines.exporting import export
from eckart.errors import BudgetError, ModelError, OptionError, PlanError
from eckart.model.factorise import store_
from eckart.plans.plan import Plan
from eckart.portable import hf
from eckart.testing import tiny_tokenizer
from eckart.tiny import tiny_model
from eckart.types import Entry

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
QUIET = {"allocator.correction": "off"}
IDS = torch.arange(4, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "dense"
    tiny_model("Llama", **SHAPE, attention_bias=True).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("The five boxing wizards jump quickly over the lazy dog, and then they sleep. " * 40)
    return eckart.Calibration(str(path), 8, 48)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def everything(folder):
    """A plan with each form, by hand: every storage that packs, some widths, a cut as ever, one dense layer."""
    names = [t.name for t in eckart.inspect(folder).targets]
    kinds = [
        {"rank": None, "storage": "packed", "bits": 3, "group": 32},
        {"rank": 7, "storage": "packed_pair", "bits": 6, "group": 64},
        {"rank": 5, "storage": "packed_pivoted", "bits": 4, "group": 32},
        {"rank": 4, "storage": "packed_sum", "bits": 2, "group": 64},
        {"rank": 6, "storage": "pivoted"},
        {"rank": None},
        {"rank": None, "storage": "packed", "bits": 8, "group": 128},
    ]
    return Plan(tuple(Entry((name,), **kinds[i % len(kinds)]) for i, name in enumerate(names)))


@pytest.fixture(scope="module")
def mixed(folder, calibration, tmp_path_factory):
    """A model with each form, compressed and saved."""
    out = tmp_path_factory.mktemp("mixed") / "small"
    return eckart.compress(folder, plan=everything(folder), calibration=calibration, options=QUIET, out=out), out


@pytest.mark.parametrize(
    ("recipe", "asked", "bits"), [("rtn", {"bits": 4.5}, 4), ("gptq", {}, 4), ("gptq", {"bits": 3.6}, 3)]
)
def test_the_baselines_have_one_width(recipe, asked, bits, folder, calibration):
    made = eckart.plan(folder, recipe=recipe, calibration=calibration, **asked)
    assert {(e.storage, e.rank, e.bits, e.group) for e in made.entries} == {("packed", None, bits, 64)}
    assert made.reached["bits"] <= asked.get("bits", 4.5)
    assert made.made_by["widths"] == [2, 3, 4, 5, 6, 8]


def test_gptq_is_rounded_with_the_input_gram_alone(folder, calibration):
    """The codes of one layer against the rounding of its weight with the Gram of what enters it."""
    from eckart.linalg import damped
    from eckart.maths.rounding import rounded

    dense, name, seen = checkpoint.load_model(folder), "model.layers.0.mlp.gate_proj", []
    ids = eckart.load_windows(calibration.data, tiny_tokenizer(), windows=8, length=48).ids
    dense.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        dense(input_ids=ids, use_cache=False)
    x = seen[0].flatten(0, 1).double()
    expected = rounded(dense.get_submodule(name).weight.detach(), 4, 64, damped(x.T @ x, 0.01)).weight
    made = eckart.compress(folder, recipe="gptq", bits=4.5, calibration=calibration)
    found = made.model.get_submodule(name).weight.double()
    assert float((found - expected).abs().gt(1e-6).double().mean()) < 0.01  # but for ties, by the order of sums


@pytest.mark.parametrize("bits", [2.6, 3.5, 4.6, 6.0, 9.0, 16.0])
def test_every_budget_is_kept(bits, folder, calibration):
    made = eckart.plan(folder, bits=bits, calibration=calibration, options=QUIET)
    assert made.reached["bits"] <= bits
    assert made.asked["bits"] == bits
    groups, entries = eckart.plans.resolve(made, eckart.inspect(folder).targets)
    stored = sum(ledger.entry_bytes(g, e, 4) for g, e in zip(groups, entries, strict=True))
    assert stored * 8 / sum(g.parameters for g in groups) == pytest.approx(made.reached["bits"])


def test_more_bits_lose_less_and_widths_forbid(folder, calibration):
    plans = [eckart.plan(folder, bits=b, calibration=calibration, options=QUIET) for b in (3.0, 4.0, 5.0)]
    losses = [plan.reached["predicted_kl"] for plan in plans]
    assert losses[0] > losses[1] > losses[2] > 0
    assert len({e.bits for e in plans[1].entries}) > 1
    only = eckart.plan(folder, bits=5.0, widths="4,8", calibration=calibration, options=QUIET)
    assert {e.bits for e in only.entries} <= {None, 4, 8}
    assert only.reached["predicted_kl"] >= losses[2]


def test_a_size_and_a_loss_may_be_asked_for(folder, calibration, tmp_path):
    size = 130_000
    made = eckart.compress(
        folder, size=size, widths="2,3,4,6,8", calibration=calibration, options=QUIET, out=tmp_path / "small"
    )
    assert sum(p.stat().st_size for p in (tmp_path / "small").glob("*.safetensors")) <= size
    assert any(e.bits for e in made.plan.entries)
    bounded = eckart.plan(folder, max_kl=0.05, widths="2,3,4,6,8", calibration=calibration, options=QUIET)
    assert bounded.reached["predicted_kl"] <= 0.05
    assert bounded.reached["bits"] < 9


def test_the_prediction_is_measured_and_corrected(folder, calibration):
    made = eckart.compress(folder, bits=4.0, calibration=calibration, options={"allocator.correction": "cheap"})
    kl = made.provenance["kl"]
    assert kl["measured"] == made.plan.reached["measured_kl"]
    assert 1 / 3 < kl["measured"] / kl["predicted"] < 3


def test_every_form_comes_back_bit_for_bit(mixed):
    made, out = mixed
    assert Counter(spec["storage"] for spec in hf.specs_of(made.model).values()).keys() == {
        "packed", "packed_pair", "packed_pivoted", "packed_sum", "pivoted"
    }  # fmt: skip
    loaded = eckart.load(out)
    assert torch.equal(logits(loaded), logits(made.model))
    for key, tensor in made.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert checkpoint.read_plan(out) == made.plan
    loaded.save_pretrained(out.parent / "again")
    assert (out.parent / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_ledger_is_what_lies_on_the_disk(mixed):
    from safetensors import safe_open

    made, out = mixed
    with safe_open(out / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    assert sum(stored.values()) == made.ledger.model_bytes_kept
    names = {t.name: t.parameters for t in made.layout.targets}
    of_targets = sum(
        size
        for key, size in stored.items()
        if key.startswith(tuple(f"{name}." for name in names)) and "bias" not in key
    )
    assert made.ledger.bits == pytest.approx(of_targets * 8 / sum(names.values()), abs=1e-12)


def test_memory_at_run_time_is_that_of_the_file(mixed):
    _, out = mixed
    loaded = eckart.load(out)
    held = sum(t.nbytes for t in [*loaded.parameters(), *loaded.buffers()])
    on_disk = (out / "model.safetensors").stat().st_size
    assert held < 1.1 * on_disk


def test_half_precision_keeps_the_scales(folder, calibration, tmp_path):
    made = eckart.compress(
        folder,
        plan=everything(folder),
        calibration=calibration,
        dtype="bfloat16",
        options=QUIET,
        out=tmp_path / "small",
    )
    loaded = eckart.load(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(made.model))
    as_float = eckart.load(tmp_path / "small", dtype=torch.float32)
    scales = [key for key in loaded.state_dict() if key.endswith("weight_scale")]
    assert scales
    for key in scales:
        assert torch.equal(as_float.state_dict()[key], loaded.state_dict()[key])
        assert loaded.state_dict()[key].dtype == torch.bfloat16
    assert as_float.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype == torch.float32


def test_it_is_made_dense_again(mixed, tmp_path):
    _, out = mixed
    loaded = eckart.load(out)
    expected = logits(loaded)
    dense = loaded.dequantize()
    assert not hf.specs_of(dense)
    assert torch.allclose(logits(dense), expected, atol=1e-5 * float(expected.abs().max()))
    eckart.convert(out, storage="dense", out=tmp_path / "dense")
    assert torch.equal(logits(eckart.load(tmp_path / "dense")), logits(dense))


ALONE = """
import json, sys
sys.modules["eckart"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(torch.arange(4, 40)[None]).logits[0, -1].tolist()))
"""


def test_transformers_reads_it_with_and_without_the_package(mixed, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    made, out = mixed
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(made.model))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    line = [sys.executable, "-W", "ignore", "-c", ALONE, str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), logits(made.model)[0, -1], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"recipe": "svd-llm", "bits": 4.0},
            OptionError,
            "recipe svd-llm has no form of few bits; take one of rtn, gptq",
        ),
        ({"recipe": "rtn", "keep": 0.8}, OptionError, "keep is 0.8, which is a share of numbers"),
        ({"bits": 4.0, "keep": 0.8}, OptionError, "keep and bits were both asked for"),
        ({"bits": 0.5}, OptionError, r"bits is 0.5, but must lie in \(1, 16\]"),
        ({"bits": 4.0, "widths": "4,7"}, OptionError, "widths has '7', but must be some of 2,3,4,5,6,8"),
        ({"bits": 4.0, "options": {"refiners": "recover"}}, OptionError, "refiner recover trains factors"),
        ({"bits": 4.0, "options": {"allocator": "knapsack"}}, OptionError, "allocator knapsack shares out numbers"),
        ({"bits": 4.0, "options": {"grouping.size": 2}}, OptionError, "grouping.size is not 1"),
        ({"bits": 1.5, "options": QUIET}, BudgetError, "the fewest that these widths reach"),
        ({"recipe": "gptq", "bits": 1.5}, BudgetError, "the budget is 1.500 bits per weight"),
    ],
)
def test_what_cannot_be_is_refused(arguments, error, text, folder, calibration):
    with pytest.raises(error, match=text):
        eckart.plan(folder, calibration=calibration, **arguments)


@pytest.mark.parametrize("recipe", ["rtn", "eckart"])
def test_experts_are_refused_before_any_work(recipe, calibration):
    model = MIXTURES["qwen3-moe"]()
    with pytest.raises(PlanError, match=r"experts cannot have few bits yet .*leave them out with --exclude"):
        eckart.plan(model, recipe=recipe, bits=4.0, calibration=calibration, tokenizer=tiny_tokenizer())


def test_a_model_with_experts_has_few_bits_elsewhere(calibration):
    """The tokens of a mixture are as any others to its attention; experts that are left out stay as they are."""
    arguments = {"calibration": calibration, "tokenizer": tiny_tokenizer(), "options": QUIET, "bits": 5.0}
    made = eckart.compress(MIXTURES["qwen3-moe"](), exclude=["*.experts.*"], **arguments)
    assert made.ledger.bits <= 5
    assert any(entry.bits is not None for entry in made.plan.entries)


@pytest.mark.parametrize("storage", ["packed", "packed_pair"])
def test_an_expert_in_a_plan_is_refused(storage, calibration):
    model = MIXTURES["qwen3-moe"]()
    name = next(target.name for target in eckart.inspect(model).targets if target.expert is not None)
    rank = None if storage == "packed" else 4
    plan = Plan((Entry((name,), rank, storage, bits=4, group=32),))
    with pytest.raises(PlanError, match="is an expert, which are stored as stacks"):
        eckart.compress(model, plan=plan, calibration=calibration, tokenizer=tiny_tokenizer())


def test_experts_are_cut_beside_few_bits_by_a_plan(calibration, tmp_path):
    """Low rank for the experts and few bits for attention, in one plan: the ledger and the files agree."""
    model = MIXTURES["qwen3-moe"]()
    targets = eckart.inspect(model).targets
    experts = {}
    for target in targets:
        if target.expert is not None:
            experts.setdefault((target.block, target.kind), []).append(target.name)
    rows = [Entry(tuple(names), 6, "pivoted", own_bases=True) for names in experts.values()]
    packed = [Entry((t.name,), None, "packed", bits=4, group=32) for t in targets if t.kind.endswith("q_proj")]
    made = eckart.compress(
        model, plan=Plan((*rows, *packed)), calibration=calibration, tokenizer=tiny_tokenizer(), out=tmp_path / "out"
    )
    again = eckart.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(made.model))
    stored = sum(t.numel() * t.element_size() for t in again.state_dict().values())
    assert stored == made.ledger.model_bytes_kept


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            {"storage": "packed", "rank": "dense", "bits": 7, "group": 64},
            "bits is 7, but storage 'packed' needs one of",
        ),
        ({"storage": "packed", "rank": "dense", "bits": 4}, "group is None, but storage 'packed' needs one of"),
        ({"storage": "pair", "rank": 3, "bits": 4, "group": 64}, "bits and group stand beside storage 'pair'"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(entry, text):
    data = {"format": "eckart-plan", "version": 1, "entries": [{"targets": ["a.q"], **entry}]}
    with pytest.raises(PlanError, match=text):
        Plan.from_dict(data)


@pytest.mark.parametrize(("storage", "rank"), [("packed", 3), ("packed_pair", None), ("packed_pivoted", 64)])
def test_a_rank_that_a_storage_has_not_is_refused(storage, rank, folder):
    plan = Plan((Entry(("model.layers.0.self_attn.q_proj",), rank, storage, bits=4, group=64),))
    with pytest.raises(PlanError, match=rf"storage '{storage}', since it has"):
        eckart.plans.resolve(plan, eckart.inspect(folder).targets)


def test_plans_with_shared_bases_and_refiners_are_refused(folder, calibration):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    shared = Plan((Entry(tuple(names), 3, "packed_pair", bits=4, group=64),))
    with pytest.raises(PlanError, match="shares its basis"):
        eckart.compress(folder, plan=shared, calibration=calibration)
    alone = Plan((Entry((names[0],), None, "packed", bits=4, group=64),))
    with pytest.raises(OptionError, match="has few bits in the plan, and refiner recover trains factors"):
        eckart.compress(folder, plan=alone, calibration=calibration, options={"refiners": "recover"})


def test_exports_and_other_storages_are_refused(mixed, tmp_path):
    made, out = mixed
    for to in ("onnx", "openvino"):
        with pytest.raises(ModelError, match=f"has few bits, which cannot be exported to {to} yet"):
            export(out, to=to, out=tmp_path / to)
    with pytest.raises(ValueError, match="has few bits, which another storage would not have"):
        store_(made.model, next(iter(hf.specs_of(made.model))), "pair")


def test_losses_are_told_by_one_text_and_nothing_is_decomposed_twice(folder, calibration, monkeypatch):
    def twice(*args):
        raise AssertionError("decomposed for losses that few bits do not use")

    monkeypatch.setattr("eckart.factorizers.two_sided.TwoSided._unseen", twice)
    plan = eckart.plan(folder, bits=4.0, options=QUIET, calibration=calibration)
    assert plan.made_by["factorizer"]["losses"] == "unseen"  # the recipe's own, for cuts without bits


def test_a_recipe_without_bits_is_what_it_was():
    assert recipes.find("eckart").packing is None
    assert not {"forms", "widths", "group"} & recipes.find("eckart").to_dict().keys()


def test_devices_that_would_share_a_layer_are_refused():
    from eckart.portable.tensor_parallel import _refuse
    from eckart.storages.packed import PackedLinear

    layer = PackedLinear(64, 8, 4, 32)
    layer.tensor_parallel_name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match="up_proj: a layer of few bits cannot be split over devices yet"):
        _refuse(layer, "colwise")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for PEFT's ways
def test_an_adapter_trains_beside_packed_layers(mixed):
    """QLoRA's pattern: the packed numbers stay, the adapter gets gradients."""
    peft = pytest.importorskip("peft")
    from eckart.engines import adapters

    _, out = mixed
    base = eckart.load(out)
    before, kept = logits(base), {key: t.clone() for key, t in base.state_dict().items() if "weight_packed" in key}
    config = adapters.lora(peft.LoraConfig(target_modules=["q_proj", "k_proj", "up_proj"], r=2))
    model = peft.get_peft_model(base, config)
    assert torch.equal(logits(model), before)  # B starts at zero
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)
    after = {
        key.replace(".base_layer", "").removeprefix("base_model.model."): t for key, t in model.state_dict().items()
    }
    assert all(torch.equal(after[key], t) for key, t in kept.items())
