"""Recipe `eckart` with its blocks refined, from the command line: dense entries, pivoted storage, then `--recover`."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_block_collaborative import make_model, trained_state  # noqa: F401
from test_residual_metric import grams_by_autograd, weighted_errors

import eckart
from eckart import recipes, registry
from eckart._cli import main
from eckart._cli.compress import with_recovery
from eckart.checkpoints.checkpoint import load_model
from eckart.plans.plan import Plan
from eckart.portable import hf
from eckart.refiners.recover import Recover
from eckart.testing import tiny_tokenizer
from eckart.text.data import load_windows

TEXT = "After the closed form, the factors of a whole block are refined together. " * 30
DATA = ("--data", "text.txt", "--windows", "12", "--length", "24")
OPTIONS = {"form": "free", "start": "found", "metric": "gradient", "free_rate": 3e-3, "batch": 5, "free_steps": 60}
REFINED = ["--option=refiners=block_collaborative"]
REFINED += [f"--option=block_collaborative.{name}={value}" for name, value in OPTIONS.items()]
DENSE = ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj")


@pytest.fixture
def folder(tmp_path, monkeypatch, trained_state):  # noqa: F811
    """A dense model, a text and a plan of recipe `eckart` in which two entries were made dense by hand."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.load_state_dict(trained_state)
    model.save_pretrained("dense")
    tiny_tokenizer().save_pretrained("dense")
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = eckart.Calibration("text.txt", windows=12, length=24)
    made = eckart.plan("dense", keep=0.4, calibration=calibration, options={"allocator.correction": "off"})
    entries = [replace(entry, rank=None) if entry.name in DENSE else entry for entry in made.entries]
    Plan(tuple(entries), made.asked, {}, made.made_by).save("plan.json")
    return tmp_path


def run(monkeypatch, out, *more):
    argv = ["eckart", "compress", "dense", "--recipe", "eckart", "--plan", "plan.json", *DATA, *more, "--out", out]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    return load_model(out), json.loads((Path(out) / "provenance.json").read_text())


@torch.no_grad()
def loss(model, ids):
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def test_refined_then_recovered(folder, monkeypatch):
    dense = load_model("dense")
    text = load_windows("text.txt", tiny_tokenizer(), windows=12, length=24, spare=8)
    assert len(text.unseen) == 8
    closed, _ = run(monkeypatch, "closed")
    refined, how = run(monkeypatch, "refined", *REFINED)
    recovered, then = run(
        monkeypatch, "recovered", *REFINED, "--recover", "-o", "recover.written=0", "-o", "recover.epochs=3"
    )

    for model in (closed, refined, recovered):
        specs = hf.specs_of(model)
        assert {spec["storage"] for spec in specs.values()} == {"pivoted"}
        for name in DENSE:
            assert name not in specs
            assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)

    grams = grams_by_autograd(dense, text.ids, seed=0)
    errors = [weighted_errors(model, dense, text.unseen, grams, 0.1) for model in (closed, refined)]
    notes = how["refinement"]
    assert [note["block"] for note in notes] == [0, 1, 2]
    assert not any(note["rolled_back"] for note in notes)
    assert errors[0][0] == pytest.approx(notes[0]["as_found"], rel=1e-3)
    assert errors[1] == pytest.approx([note["reached"] for note in notes], rel=1e-3)
    assert all(after < before for before, after in zip(*errors, strict=True))

    assert [part["name"] for part in then["recipe"]["refiners"]] == ["block_collaborative", "recover"]
    assert then["refinement"][:3] == notes  # the blocks first, from the same factors
    assert then["refinement"][3]["loss"][0] == pytest.approx(loss(refined, text.unseen), rel=1e-4)
    assert min(then["refinement"][3]["loss"]) == pytest.approx(loss(recovered, text.unseen), rel=1e-4)
    assert loss(recovered, text.unseen) < loss(refined, text.unseen)


def test_the_full_recipe_is_eckart_and_then_both_refiners(folder):
    calibration = eckart.Calibration("text.txt", windows=12, length=24)
    few = {"block_collaborative.free_steps": 2, "recover.epochs": 1}
    made = eckart.compress("dense", recipe="eckart-full", keep=0.6, calibration=calibration, options=few)
    assert [note["refiner"] for note in made.provenance["refinement"]] == ["block_collaborative"] * 3 + ["recover"]
    bare, eckarts = recipes.find("eckart-full", {"refiners": "none"}), recipes.find("eckart", {})
    assert {**bare.to_dict(), "name": "eckart"} == eckarts.to_dict()  # the same closed form, whatever its defaults
    blocks, recovery = recipes.find("eckart-full", {}).to_dict()["refiners"]
    assert (blocks["start"], blocks["form"], blocks["metric"]) == ("found", "free", "gradient")
    assert recovery == {"name": "recover", **registry.options_of(Recover(epochs=4))}  # a longer run, else the defaults


def test_recovery_comes_behind_the_refiners_that_an_option_names():
    assert with_recovery("eckart", {}) == {"refiners": "recover"}
    assert with_recovery("lc-svd", {}) == {"refiners": "block_collaborative,recover"}
    options = {"recover.epochs": "1", "refiners": "alternating"}
    assert list(with_recovery("lc-svd", options).items()) == [
        ("refiners", "alternating,recover"),
        ("recover.epochs", "1"),
    ]
    assert with_recovery("eckart-full", {}) == {"refiners": "block_collaborative,recover"}  # once is enough
    assert with_recovery("eckart", {"refiners": "recover,alternating"}) == {"refiners": "recover,alternating"}
