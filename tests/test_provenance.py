"""A checkpoint says how it was made, well enough to make it again, and what its spectra were."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

import eckart
from eckart._cli import main
from eckart.checkpoints.checkpoint import read_provenance
from eckart.checkpoints.spectra_file import read as read_spectra
from eckart.portable.linear import weight_view
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.text.calibration import Calibration


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "a text.txt").write_text("Every number travels with its recipe, or it is hearsay. " * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEXT = Calibration("a text.txt", windows=5, length=24, seed=3, join="\n", bos="none")
OTHERS = {"options": {"factorizer.damping": 1e-5}, "include": ["*.mlp.*"], "exclude": ["*.1.mlp.up_proj"]}


@pytest.mark.parametrize(
    "arguments",
    [
        {"recipe": "svd", "keep": 0.5},
        {"recipe": "svd-llm", "keep": 0.7, "calibration": TEXT, "rank_multiple": 2, **OTHERS},
        {"recipe": "eckart", "size": "90KB", "calibration": TEXT, "dtype": "bfloat16"},
        {"recipe": "svd-llm", "calibration": TEXT, "options": {"refiners": ["refit_coefficients"]}},
    ],
)
def test_the_stored_command_makes_the_same_bytes(workspace, monkeypatch, capsys, arguments):
    eckart.compress("dense", out="made", **arguments)
    command = read_provenance("made")["command"]
    argv = [*shlex.split(command.removesuffix("--out DIR")), "--out", "again"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0, capsys.readouterr().err
    for path in sorted(Path("made").iterdir()):
        if path.name == "provenance.json":  # 0.5 for the keyword and "0.5" for the flag are one option
            mine, theirs = (json.loads((Path(f) / path.name).read_text()) for f in ("made", "again"))
            assert shlex.split(mine.pop("command")) == shlex.split(theirs.pop("command"))
            assert mine == theirs
        else:
            assert path.read_bytes() == (Path("again") / path.name).read_bytes(), path.name


def test_a_replayed_plan_is_in_the_command(workspace):
    plan = eckart.plan("dense", recipe="svd", keep=0.5)
    plan.save("some.json")
    eckart.compress("dense", recipe="svd", plan="some.json", out="made")
    assert read_provenance("made")["command"] == "eckart compress dense --recipe svd --plan some.json --out DIR"


def test_the_spectra_are_those_of_the_weights(workspace):
    """For plain SVD the curve is the tail of the energy of the weight's own singular values."""
    eckart.compress("dense", recipe="svd", keep=0.5, out="made")
    rows, model = read_spectra("made"), tiny_models()["llama"]()
    assert len(rows) == 14
    for row in rows:
        energy = torch.linalg.svdvals(weight_view(model.get_submodule(row["targets"][0])).double()).square()
        assert row["lost"][0] == [0, 1.0]
        assert row["lost"][-1] == [row["full_rank"], 0.0]
        assert len(row["lost"]) >= 12
        for rank, lost in row["lost"]:
            assert lost == pytest.approx(float(energy[rank:].sum() / energy.sum()), abs=1e-3)
        assert "energy_nats" not in row  # plain SVD does not know the loss


def test_predicted_losses_add_up_to_the_plan(workspace):
    made = eckart.compress("dense", recipe="eckart", keep=1.0, calibration=TEXT)
    assert all(row["energy_nats"] > 0 for row in made.spectra)
    made = eckart.compress("dense", recipe="eckart", keep=0.6, calibration=TEXT, out="made")
    ranks = {entry.name: entry.rank for entry in made.plan.entries}
    total = 0.0
    for row in read_spectra("made"):
        points = dict(row["lost"])
        below = max(r for r in points if r <= ranks[row["targets"][0]])
        above = min(r for r in points if r >= ranks[row["targets"][0]])
        total += row["energy_nats"] * (points[below] + points[above]) / 2
    assert total == pytest.approx(made.plan.reached["predicted_kl"], rel=0.3)


def test_converting_keeps_them(workspace):
    eckart.compress("dense", recipe="svd", keep=0.5, out="made")
    eckart.convert("made", storage="pivoted", out="other")
    assert read_spectra("other") == read_spectra("made")
    assert read_provenance("other")["command"] == read_provenance("made")["command"]
