"""The report says what the folder and the results say, escapes what models write, and loads nothing."""

import json
import re
import shutil
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from conftest import bench

import eckart
from eckart._cli import main
from eckart.errors import CheckpointError, DataError, OptionError
from eckart.evaluation import samples
from eckart.pages import report_maps
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.text.calibration import Calibration

TEXT = Calibration("text.txt", windows=5, length=24)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a dense model, its compression by recipe `eckart`, and a stored evaluation."""
    folder = tmp_path_factory.mktemp("report")
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("A page that a person can read on a phone, at night, without a network. " * 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        eckart.compress("dense", recipe="eckart", keep=0.6, calibration=TEXT, out="small")
        shutil.copytree("small", "again")
        result = eckart.evaluate("small", against="dense", data_specs=["text.txt"], windows=3, length=24)
        (folder / "eval.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def at(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def text_of(page):
    """What a reader sees: no style, no tags, one space for every gap."""
    page = re.sub(r"<style>.*?</style>|<title>.*?</title>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).replace("\u200b", "").split())


def test_the_page_says_what_the_folder_says(at):
    facts = eckart.report("small", results=["eval.json"])
    page = (at / "small" / "report.html").read_text()
    seen, result = text_of(page), json.loads((at / "eval.json").read_text())["results"][0]
    plan, provenance = (json.loads((at / "small" / name).read_text()) for name in ("plan.json", "provenance.json"))
    assert facts["page"] == "small/report.html"
    assert provenance["command"] in seen
    assert provenance["calibration"]["tokens_hash"] in seen
    assert provenance["files"]["model.safetensors"]["sha256"] in seen
    for value in provenance["versions"].values():
        assert value in seen
    assert f"{provenance['ledger']['target_parameters_kept']:,}" in seen
    assert f"{plan['reached']['predicted_kl']:.4f}" in seen
    assert f"{result['perplexity']:.3f}" in seen
    assert f"{result['dense_perplexity']:.3f}" in seen
    assert f"{result['nll'] - result['dense_nll']:.4f}" in seen  # beside the predicted loss
    assert f"{provenance['kl']['measured']:.4f}" in seen
    assert page.count("<svg") == 7  # one chart for each kind of layer
    assert page.count("<polyline") == 14
    eckart.load("small")  # a page in the folder does no harm


def test_the_map_holds_every_rank_and_storage(at):
    facts = eckart.report("small", out="page.html")
    entries = {e["targets"][0]: e for e in json.loads((at / "small/plan.json").read_text())["entries"]}
    model = tiny_models()["llama"]()
    assert len(facts["modules"]) == 14
    for row in facts["modules"]:
        entry, weight = entries[row["name"]], model.get_submodule(row["name"]).weight
        assert (row["out"], row["in"]) == tuple(weight.shape)
        assert row["rank"] == (None if entry["rank"] == "dense" else entry["rank"])
        numbers = weight.numel() if row["rank"] is None else row["rank"] * (sum(weight.shape) - row["rank"])
        assert row["share"] == pytest.approx(numbers / weight.numel())
    total = sum(row["predicted_loss"] for row in facts["modules"])
    assert total == pytest.approx(facts["reached"]["predicted_kl"], rel=1e-4)
    shown = next(chart for chart in report_maps.maps(facts["modules"]) if chart["title"] == "Rank")
    assert shown["kinds"][:2] == ["q_proj", "k_proj"]
    assert [block for block, _ in shown["rows"]] == [0, 1]
    first = facts["modules"][0]
    cell = shown["rows"][first["block"]][1][0]
    assert first["kind"] == "self_attn.q_proj"
    assert cell["text"] == ("d" if first["rank"] is None else str(first["rank"]))
    assert first["name"] in cell["title"]


def test_it_measures_and_lets_both_write(at):
    options = {"against": "dense", "data_specs": ["text.txt"], "windows": 3, "length": 24}
    facts = eckart.report("small", out="measured.html", prompts=["A <b>page</b> & more"], **options)
    stored = json.loads((at / "eval.json").read_text())
    assert facts["evaluations"][0]["results"] == stored["results"]
    (sample,) = facts["samples"]["texts"]
    page = (at / "measured.html").read_text()
    assert "<b>page</b>" not in page
    assert "A &lt;b&gt;page&lt;/b&gt; &amp; more" in page
    tokenizer, model = tiny_tokenizer(), eckart.load("small")
    ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
    for _ in range(3):  # the first tokens, one argmax at a time
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(ids[0, -3:], skip_special_tokens=True)
    assert sample["compressed"].startswith(expected)
    assert sample["dense"] != sample["compressed"]


def test_a_protocol_of_ones_own_is_measured_as_evaluate_measures_it(at, monkeypatch, capsys):
    """Every option leaves its mark on the figures, and the two commands say the same."""
    text = ["--against", "dense", "--data", "text.txt", "--length", "24"]
    own = ["--join", r"\n", "--bos", "none", "--mean", "window", "--dtype", "bfloat16"]

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["eckart", *words, "--json"])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert caught.value.code == 0, said.err
        return json.loads(said.out)

    reported = run("report", "small", "--out", "own.html", *text, *own)["evaluations"][0]["results"]
    evaluated, usual = (run("eval", "small", *text, *more)["results"] for more in (own, []))
    assert reported == evaluated
    protocol = {key: reported[0]["protocol"][key] for key in ("join", "bos", "mean", "dtype")}
    assert protocol == {"join": "\n", "bos": "none", "mean": "window", "dtype": "bfloat16"}
    assert reported[0]["perplexity"] != usual[0]["perplexity"]
    compared = eckart.compare(
        ["small", "again"], data_specs=["text.txt"], length=24, join="\n", bos="none", mean="window", dtype="bfloat16"
    )
    assert compared["models"][1]["perplexities"]["text.txt"]["perplexity"] == reported[0]["perplexity"]


def test_a_hostile_text_stays_text(at, monkeypatch):
    monkeypatch.setattr(samples, "write", lambda *a, **k: ["</blockquote><script src=http://x.example></script>"])
    eckart.report("small", out="hostile.html", prompts=["Hello"])
    page = (at / "hostile.html").read_text()
    assert "<script" not in page
    assert "&lt;script src=http://x.example&gt;" in page


def test_nothing_on_the_page_refers_outside(at):
    eckart.report("small", out="alone.html", results=["eval.json"])
    page = (at / "alone.html").read_text()
    assert not re.search(r"""(src|href|action|data)\s*=|url\(|@import|<(script|link|img|iframe|object|form)\b""", page)
    assert "default-src 'none'" in page


def test_kept_columns_and_measured_curves_are_shown(at):
    eckart.compress("dense", recipe="duo-svd", keep=0.6, calibration=TEXT, work="work", out="duo")
    facts = eckart.report("duo")
    plan = json.loads((at / "duo/plan.json").read_text())
    kept = {entry["targets"][0]: entry.get("kept") or 0 for entry in plan["entries"]}
    assert any(kept.values())
    assert {row["name"]: row["kept"] for row in facts["modules"]} == kept
    titles = [chart["title"] for chart in report_maps.maps(facts["modules"])]
    assert "Columns kept exactly" in titles
    assert any(title.startswith("Measured loss when cut alone") for title in titles)
    seen = text_of((at / "duo/report.html").read_text())
    assert "Predicted against measured" not in seen  # nothing predicted, nothing measured


def test_a_shared_basis_has_one_share(at):
    eckart.compress("dense", recipe="basis-sharing", keep=0.6, calibration=TEXT, out="shared")
    rows = eckart.report("shared")["modules"]
    grouped = [row for row in rows if row["group"] > 1]
    assert grouped
    ledger = json.loads((at / "shared/provenance.json").read_text())["ledger"]
    numbers = sum(row["share"] * row["out"] * row["in"] for row in rows)
    assert numbers == pytest.approx(ledger["target_parameters_kept"])


def test_a_checkpoint_without_spectra_has_a_page(at):
    eckart.compress("dense", recipe="svd", keep=0.5, out="bare")
    (at / "bare/spectra.json").unlink()
    eckart.report("bare")
    page = (at / "bare/report.html").read_text()
    assert "<svg" not in page
    assert "Energy effective rank" in page  # the plan still knows it


def test_the_speed_is_shown_with_what_holds_it_back(at):
    (at / "bench.json").write_text(json.dumps(bench("small", 0.75, slower=["decode at batch 1"])))
    eckart.report("small", results=["bench.json"], out="speed.html")
    seen = text_of((at / "speed.html").read_text())
    assert re.search(r"decode, batch 1 1\.0 0\.8 0\.75 0\.75 to 0\.75", seen)
    assert "Slower than dense: decode at batch 1." in seen
    assert "Because." in seen


def test_refusals(at):
    with pytest.raises(CheckpointError, match="not a checkpoint of eckart"):
        eckart.report("dense")
    with pytest.raises(DataError, match="no such results file"):
        eckart.report("small", results=["nothing.json"])
    with pytest.raises(DataError, match="results are what"):
        eckart.report("small", results=["small/plan.json"])
    (at / "other.json").write_text(json.dumps({"format": "eckart-eval", "model": "elsewhere", "results": []}))
    with pytest.raises(OptionError, match="is about elsewhere, not about small"):
        eckart.report("small", results=["other.json"])


def test_the_command(at, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eckart", "report", "small", "--results", "eval.json", "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps(eckart.report("small", results=["eval.json"])))
    assert Path(said["page"]).exists()
