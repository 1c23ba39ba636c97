"""The whole path on tiny models: from text to a folder and back."""

import json

import pytest
import torch

import eckart
from eckart.errors import BudgetError, DataError, ModelError, OptionError, OutputError, PlanError
from eckart.plans.plan import Plan
from eckart.portable.linear import weight_view
from eckart.recipes import BUILT_IN
from eckart.storages.pair import FactorizedLinear
from eckart.testing import tiny_models, tiny_tokenizer

TEXT = "The best rank-r approximation is the truncated SVD, in a metric that one has to choose well. " * 60


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def calibration(text):
    return eckart.Calibration(data=text, windows=6, length=24)


@pytest.fixture
def folder(tmp_path):
    """A dense tiny model with its tokenizer, saved as transformers saves it."""
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 40)[None], use_cache=False).logits


@pytest.mark.parametrize("recipe", sorted(name for name, recipe in BUILT_IN.items() if not recipe.widths))
def test_every_recipe_compresses_saves_and_loads_bit_for_bit(recipe, folder, calibration, tmp_path):
    made = eckart.compress(folder, recipe=recipe, keep=0.7, calibration=calibration, out=tmp_path / "small")
    loaded = eckart.load(tmp_path / "small")
    assert torch.equal(logits(made.model), logits(loaded))
    assert made.ledger.keep <= 0.7
    assert made.ledger.model_parameters_kept == sum(p.numel() for p in loaded.parameters())
    assert type(loaded).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_every_family(family, calibration, tmp_path):
    model = tiny_models()[family]()
    made = eckart.compress(
        model, tokenizer=tiny_tokenizer(), recipe="svd-llm", keep=0.6, calibration=calibration, out=tmp_path / "small"
    )
    assert torch.equal(logits(made.model), logits(eckart.load(tmp_path / "small")))
    assert made.ledger.model_parameters_kept == sum(p.numel() for p in made.model.parameters())


@pytest.mark.parametrize("recipe", sorted(name for name, recipe in BUILT_IN.items() if not recipe.widths))
def test_keep_1_gives_the_dense_logits_back(recipe, folder, calibration, tmp_path):
    dense = logits(eckart.checkpoints.checkpoint.load_model(folder))
    made = eckart.compress(folder, recipe=recipe, keep=1.0, calibration=calibration, out=tmp_path / "same")
    assert torch.equal(logits(made.model), dense)
    assert torch.equal(logits(eckart.load(tmp_path / "same")), dense)


def test_full_rank_everywhere_gives_the_dense_logits_back(folder, calibration):
    """Unlike keep 1.0, which leaves the weights alone, this goes through every factor."""
    dense = logits(eckart.checkpoints.checkpoint.load_model(folder))
    entries = tuple(
        eckart.types.Entry((t.name,), min(t.out_features, t.in_features)) for t in eckart.inspect(folder).targets
    )
    made = eckart.compress(folder, recipe="svd-llm", plan=Plan(entries), calibration=calibration)
    assert torch.allclose(logits(made.model), dense, atol=1e-4 * float(dense.abs().max()))


def test_svd_llm_has_the_smallest_output_error(folder, calibration):
    """The error on the calibration outputs, which svd-llm minimises: the others must not beat it."""
    dense = eckart.checkpoints.checkpoint.load_model(folder)
    ids = eckart.load_windows(calibration.data, tiny_tokenizer(), windows=6, length=24).ids
    name, seen = "model.layers.0.mlp.gate_proj", []
    dense.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        dense(input_ids=ids, use_cache=False)
    x, weight = seen[0].flatten(0, 1), weight_view(dense.get_submodule(name))
    errors = {}
    for recipe in ("svd", "asvd", "svd-llm"):
        made = eckart.compress(folder, recipe=recipe, keep=0.5, calibration=calibration)
        errors[recipe] = float((x @ (weight - made.model.get_submodule(name).weight.detach()).T).norm())
    assert errors["svd-llm"] < errors["asvd"]
    assert errors["svd-llm"] < 0.99 * errors["svd"]


def test_plan_then_replay_gives_the_same_model(folder, calibration, tmp_path):
    plan = eckart.plan(folder, recipe="svd-llm", keep=0.6, calibration=calibration)
    plan.save(tmp_path / "plan.json")
    one = eckart.compress(folder, recipe="svd-llm", keep=0.6, calibration=calibration)
    two = eckart.compress(folder, recipe="svd-llm", plan=tmp_path / "plan.json", calibration=calibration)
    assert torch.equal(logits(one.model), logits(two.model))
    assert one.plan == two.plan == plan


def test_a_plan_may_be_edited_by_hand(folder, calibration, tmp_path):
    plan = eckart.plan(folder, recipe="svd", keep=0.6)
    data = plan.to_dict()
    data["entries"] = [{"targets": ["model.layers.1.mlp.up_proj"], "rank": 3}]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    made = eckart.compress(folder, recipe="svd", plan=tmp_path / "plan.json", out=tmp_path / "small")
    layers = [n for n, m in made.model.named_modules() if isinstance(m, FactorizedLinear)]
    assert layers == ["model.layers.1.mlp.up_proj"]
    assert torch.equal(logits(made.model), logits(eckart.load(tmp_path / "small")))


def test_the_same_run_writes_the_same_bytes(folder, calibration, tmp_path):
    for name in ("one", "two"):
        eckart.compress(folder, recipe="svd-llm", keep=0.6, calibration=calibration, out=tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_provenance_tells_the_whole_story(folder, calibration, tmp_path):
    eckart.compress(folder, recipe="asvd", keep=0.6, calibration=calibration, out=tmp_path / "small")
    provenance = json.loads((tmp_path / "small" / "provenance.json").read_text())
    assert provenance["recipe"]["factorizer"] == {"name": "asvd", "alpha": 0.5, "damping": 1e-6}
    assert provenance["calibration"]["tokens"] == 6 * 24
    assert len(provenance["calibration"]["tokens_hash"]) == 64
    assert provenance["ledger"]["keep"] <= 0.6
    assert {"eckart", "torch", "transformers", "python"} <= set(provenance["versions"])


def test_include_and_exclude_reach_the_plan(folder, calibration):
    made = eckart.compress(folder, recipe="svd", keep=0.5, include=["mlp.*"], exclude=["*.down_proj"])
    names = {name for name, module in made.model.named_modules() if isinstance(module, FactorizedLinear)}
    assert {name.rsplit(".", 1)[1] for name in names} == {"gate_proj", "up_proj"}


def test_half_precision_is_computed_in_float32_and_stored_as_it_was(tmp_path, calibration):
    tiny_models()["llama"]().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    made = eckart.compress(
        str(tmp_path / "half"), recipe="svd-llm", keep=0.6, calibration=calibration, out=tmp_path / "s"
    )
    loaded = eckart.load(tmp_path / "s")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(made.model), logits(loaded))
    assert made.ledger.model_bytes_kept == 2 * made.ledger.model_parameters_kept


def test_self_calibration_needs_no_text(folder):
    made = eckart.compress(
        folder, recipe="svd-llm", keep=0.6, calibration=eckart.Calibration("self", windows=2, length=16, seed=1)
    )
    assert made.provenance["calibration"]["tokens"] == 32


def refused(error, text, model, default, **arguments):
    with pytest.raises(error) as caught:
        eckart.compress(model, **{"recipe": "svd-llm", "calibration": default, **arguments})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_input(folder, calibration, tmp_path, text):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "few.txt").write_text("a few words")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    name = "model.layers.0.mlp.up_proj"

    def plan(target, rank):
        return Plan((eckart.types.Entry((target,), rank),))

    def text_of(path):
        return eckart.Calibration(data=path, windows=6, length=24)

    too_long = eckart.Calibration(data=text, windows=2, length=65)
    for error, message, arguments in (
        (BudgetError, "must lie in (0, 1]", {"keep": 0.0}),
        (BudgetError, "must lie in (0, 1]", {"keep": 1.2}),
        (BudgetError, "smallest reachable share is", {"keep": 0.001}),
        (PlanError, "which is not a target of this model; did you mean", {"plan": plan(name + "x", 3)}),
        (PlanError, "must lie in [1, 32]", {"plan": plan(name, 33)}),
        (PlanError, "must lie in [1, 32]", {"plan": plan(name, 0)}),
        (PlanError, "no such plan file", {"plan": tmp_path / "none.json"}),
        (OutputError, "exists and is not empty", {"out": tmp_path / "full"}),
        (DataError, "empty", {"calibration": text_of(str(tmp_path / "empty.txt"))}),
        (DataError, "windows", {"calibration": eckart.Calibration(data=text, windows=10_000, length=24)}),
        (DataError, "one window", {"calibration": text_of(str(tmp_path / "few.txt"))}),
        (DataError, "no such", {"calibration": text_of(str(tmp_path / "none.txt"))}),
        (DataError, "65", {"calibration": too_long}),
        (OptionError, "unknown recipe", {"recipe": "svd-lm"}),
        (OptionError, "dtype is 'int8'", {"dtype": "int8"}),
    ):
        refused(error, message, folder, calibration, **arguments)


def test_bad_models(folder, calibration, tmp_path):
    refused(ModelError, "no such folder", str(tmp_path / "none"), calibration)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "dense" / "config.json").read_text())
    refused(ModelError, "holds no weights", str(tmp_path / "bare"), calibration)
    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    refused(ModelError, "model.layers.1.self_attn.k_proj: 1 of", str(tmp_path / "nan"), calibration)
    refused(ModelError, "no linear layer to compress", folder, calibration, include=["nothing"])


def test_a_failed_run_leaves_nothing_behind(folder, calibration, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", broken)
    refused(OutputError, "the disk is full; nothing was kept", folder, calibration, out=tmp_path / "small", keep=0.6)
    assert not list(tmp_path.glob("*small*"))
    assert not list(tmp_path.glob(".*small*"))
