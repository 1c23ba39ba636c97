"""A broken model has losses beyond numbers: they are shown as they are, and what is written stays JSON."""

import json
import math
import shutil
import sys

import pytest
import torch

import eckart
from eckart._cli import main
from eckart.checkpoints import checkpoint
from eckart.checks import problem
from eckart.errors import NumericalError
from eckart.factorizers.base import failures_named
from eckart.factorizers.svd import SVD
from eckart.support.not_finite import exp, numbers, to_json
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.types import Group, Target

INF, NAN = math.inf, math.nan
TEXT = ("--data", "text.txt", "--windows", "2", "--length", "24")


def strict(text):
    """JSON by its standard, which knows neither NaN nor Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_survive_json():
    value = {"a": [1.5, INF, -INF, NAN], "b": {"c": (INF, "text", None, True, 3)}}
    back = numbers(strict(to_json(value)))
    assert back["a"][:3] == [1.5, INF, -INF]
    assert math.isnan(back["a"][3])
    assert back["b"]["c"] == [INF, "text", None, True, 3]
    assert all(float(word) == number for word, number in (("Infinity", INF), ("-Infinity", -INF)))
    assert to_json({"a": [1, 2.5]}, indent=1) == json.dumps({"a": [1, 2.5]}, indent=1)


def test_the_exponential_has_no_error():
    assert exp(1.0) == math.e
    assert exp(709.0) == math.exp(709.0)
    assert exp(710.0) == INF == exp(INF)
    assert math.isnan(exp(NAN))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`dense`; `good` and `broken`, checkpoints, of which the second is sure of what is wrong; `notes`, whose JSON
    files hold what Python writes for numbers that are not finite."""
    folder = tmp_path_factory.mktemp("broken")
    tiny_tokenizer().save_pretrained(folder / "dense")
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("A model that is broken should say so, and not break what reads it. " * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = eckart.Calibration("text.txt", windows=4, length=24)
        eckart.compress("dense", recipe="eckart", keep=0.7, calibration=text, out="good")
        made = eckart.compress("dense", recipe="svd", keep=0.5)
        with torch.no_grad():
            made.model.lm_head.weight.mul_(1e5)
        made.save("broken")
    notes = folder / "notes"
    shutil.copytree(folder / "good", notes)
    provenance = json.loads((notes / "provenance.json").read_text())
    provenance["kl"] |= {"measured": INF, "predicted": NAN}
    del provenance["files"]  # the hashes, by which what follows would be an edit and no note of ours
    (notes / "provenance.json").write_text(json.dumps(provenance))
    plan = json.loads((notes / "plan.json").read_text())
    plan["reached"]["predicted_kl"] = NAN
    losses = [INF, NAN, 800.0]
    for entry, loss in zip(plan["entries"], losses, strict=False):
        entry["details"]["predicted_loss"] = loss
    (notes / "plan.json").write_text(json.dumps(plan))
    spectra = json.loads((notes / "spectra.json").read_text())
    spectra["groups"][0]["lost"] = [[rank, NAN] for rank, _ in spectra["groups"][0]["lost"]]
    spectra["groups"][1]["lost"][-1][1] = INF
    spectra["groups"][1]["measured_kl"] = {"0.4": INF, "0.8": NAN}
    (notes / "spectra.json").write_text(json.dumps(spectra))
    return folder


@pytest.fixture
def run(made, monkeypatch, capsys):
    """`run(words)` is what a command printed, which has to go well."""
    monkeypatch.chdir(made)

    def runner(*words):
        monkeypatch.setattr(sys, "argv", ["eckart", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert caught.value.code == 0, said.err
        return said.out

    return runner


def test_a_perplexity_beyond_numbers_is_infinite_and_goes_through_every_command(made, run):
    rows = {}
    for name in ("good", "broken"):
        (made / f"{name}.json").write_text(run("eval", name, "--against", "dense", *TEXT, "--json"))
        rows[name] = numbers(strict((made / f"{name}.json").read_text()))["results"][0]
    assert rows["broken"]["nll"] > 710
    assert rows["broken"]["perplexity"] == INF
    assert "inf" in run("eval", "broken", *TEXT)
    facts = numbers(strict(run("report", "broken", "--results", "broken.json", "--out", "broken.html", "--json")))
    assert facts["evaluations"][0]["results"][0] == rows["broken"]
    page = (made / "broken.html").read_text()
    assert "<td>inf</td>" in page
    assert "<b>inf</b>" in page  # a tile
    words = ("compare", "good", "broken", "--results", "good.json", "--results", "broken.json", "--out", "both.html")
    compared = numbers(strict(run(*words, "--json")))["models"]
    assert [row["perplexities"]["text.txt"]["perplexity"] for row in compared] == [rows["good"]["perplexity"], INF]
    assert [row["best"] for row in compared] == [["size"], []]  # although it is the smaller one
    page = (made / "both.html").read_text()
    assert "<td>inf</td>" in page
    assert page.count('<circle class="dot') == 1
    assert "nan" not in page[page.index("<svg") : page.index("</svg>")]
    assert "inf" in run(*words)


def test_what_the_folder_says_is_shown_as_it_is(made, run):
    facts = numbers(strict(run("report", "notes", "--out", "notes.html", "--json")))
    assert facts["kl"]["measured"] == INF
    assert math.isnan(facts["reached"]["predicted_kl"])
    page = (made / "notes.html").read_text()
    drawn = "".join(page[start:].partition("</svg>")[0] for start in range(len(page)) if page.startswith("<svg", start))
    assert drawn
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert "--v:nan" not in page
    assert "--v:inf" not in page
    for shown in ("<td>inf</td>", "<td>nan</td>", ">inf</td>", ">nan</td>"):
        assert shown in page
    assert strict(run("compare", "good", "notes", "--json"))["models"][1]["folder"] == "notes"


def test_what_is_saved_again_is_json(made, run):
    run("convert", "notes", "--storage", "pair", "--out", "again")
    for name in ("plan.json", "provenance.json", "spectra.json"):
        path = made / "again" / name
        if path.exists():
            strict(path.read_text())
    assert checkpoint.read_provenance(made / "again")["kl"]["measured"] == INF
    assert math.isnan(checkpoint.read_plan(made / "again").reached["predicted_kl"])


@pytest.mark.parametrize(
    ("value", "words"),
    [(NAN, "eigendecomposition failed: linalg.eigh"), (1e200, "NaN or infinity in its spectrum")],
)
def test_a_weight_beyond_numbers_is_named_when_it_is_decomposed(value, words):
    group, weight, statistics = problem(12, 20, 64)
    weight[0, 0] = value
    with pytest.raises(NumericalError, match=rf"^blocks\.0\.linear: {words}") as caught:
        SVD().decompose(group, [weight], statistics)
    assert str(caught.value).isprintable()


def test_what_a_failed_decomposition_says_is_one_line():
    words, group = (
        r"^q: eigendecomposition failed: out of memory\\nmuch more$",
        Group((Target("q", 0, "q", 2, 2, False),)),
    )
    with pytest.raises(NumericalError, match=words), failures_named(group):
        raise RuntimeError("out of memory\nmuch more")
