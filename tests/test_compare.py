"""Comparing: who is beaten, by plain counting; and numbers that were not measured alike are refused by name."""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
from conftest import bench

import eckart
from eckart._cli import main
from eckart.errors import CheckpointError, OptionError
from eckart.pages.comparison import check_protocols, pareto
from eckart.testing import tiny_models, tiny_tokenizer

PROTOCOL = {
    "tokens_hash": "a" * 64, "length": 24, "windows": 3, "stride": 24, "bos": "start", "mean": "token",
    "join": "\n\n", "seed": None, "dtype": "float32", "device": "cpu", "spec": "x.txt",
}  # fmt: skip


def result(folder, perplexity, **changes):
    row = {"data": "x.txt", "perplexity": perplexity, "dense_perplexity": 2.0, "protocol": {**PROTOCOL, **changes}}
    return {"format": "eckart-eval", "version": 1, "model": folder, "results": [row]}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    (folder / "x.txt").write_text("Numbers that were not measured alike have no order. " * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, keep in (("A", 0.8), ("B", 0.6), ("C", 0.4)):
            eckart.compress("dense", recipe="svd", keep=keep, out=name)
    return folder


@pytest.fixture
def at(made, monkeypatch, tmp_path):
    monkeypatch.chdir(made)

    def store(*results):
        paths = []
        for number, one in enumerate(results):
            paths.append(tmp_path / f"{number}.json")
            paths[-1].write_text(json.dumps(one))
        return paths

    return store


def test_the_front_is_what_counting_says():
    random.seed(1)
    points = [(random.randint(0, 6), random.randint(0, 6)) for _ in range(40)]
    for point, best in zip(points, pareto(points), strict=True):
        dominating = [
            o for o in points if o[0] <= point[0] and o[1] <= point[1] and (o[0] < point[0] or o[1] < point[1])
        ]
        assert best == (not dominating)
    assert pareto([(1.0, None), (2.0, 3.0), (None, 1.0)]) == [False, True, False]


def test_sizes_losses_and_who_is_beaten(at):
    paths = at(result("A", 3.0), result("B", 3.5), result("C", 3.2), bench("A", 1.1), bench("C", 1.6))
    rows = {row["folder"]: row for row in eckart.compare(["A", "B", "C"], results=paths)["models"]}
    sizes = [rows[name]["ledger"]["model_bytes_kept"] for name in "ABC"]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["A"]["perplexities"]["x.txt"]["perplexity"] == 3.0
    assert "size" in rows["A"]["best"]  # lowest loss
    assert "size" not in rows["B"]["best"]  # C is smaller and better
    assert "size" in rows["C"]["best"]
    assert rows["B"]["best"] == []
    assert "speed" in rows["A"]["best"]
    assert "speed" in rows["C"]["best"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens_hash": "b" * 64}, "on x.txt their token ids (tokens_hash) differ: aaaaaaaaaaaa and bbbbbbbbbbbb"),
        ({"length": 48}, "length differ: 24 and 48"),
        ({"windows": 4}, "windows differ: 3 and 4"),
        ({"stride": 12}, "stride differ"),
        ({"bos": "none"}, "bos differ: 'start' and 'none'"),
        ({"mean": "window"}, "mean differ"),
        ({"join": "\n"}, "join differ"),
        ({"seed": 3}, "seed differ: None and 3"),
        ({"dtype": "bfloat16"}, "dtype differ"),
    ],
)
def test_protocols_are_not_mixed(at, changes, words):
    paths = at(result("A", 3.0), result("B", 3.5), result("C", 3.2, **changes))
    with pytest.raises(OptionError, match="A and C were not measured alike") as caught:
        eckart.compare(["A", "B", "C"], results=paths)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_speeds_are_not_mixed_either(at):
    with pytest.raises(OptionError, match=r"A and B were not timed alike: their threads differ: 1 and 2"):
        eckart.compare(["A", "B"], results=at(bench("A", 1.1), bench("B", 1.2, threads=2)))
    with pytest.raises(OptionError, match=r"A: was timed twice, and their dtype differ"):
        eckart.compare(["A", "B"], results=at(bench("A", 1.1), bench("A", 1.2, dtype="bfloat16")))
    rows = eckart.compare(["A", "B"], results=at(bench("A", 1.1), bench("B", 1.2)))["models"]
    assert [row["decoding"]["speedup"] for row in rows] == [1.1, 1.2]  # of batch 1


def test_another_name_of_the_same_text_is_no_other_text(at):
    """The hash of the tokens decides, and where the file lay does not."""
    paths = at(result("A", 3.0), result("B", 3.5, spec="/elsewhere/x.txt", device="cuda"))
    rows = eckart.compare(["A", "B"], results=paths)["models"]
    assert [len(row["perplexities"]) for row in rows] == [1, 1]
    assert set(rows[0]["perplexities"]) == set(rows[1]["perplexities"])


def test_a_model_without_a_corpus_is_refused_and_one_without_any_is_not(at):
    other = result("B", 3.5)
    other["results"][0]["data"] = "y.txt"
    with pytest.raises(OptionError, match=r"A and B were not measured alike: only A has x\.txt"):
        eckart.compare(["A", "B"], results=at(result("A", 3.0), other))
    rows = eckart.compare(["A", "B"], results=at(result("A", 3.0)))["models"]
    assert [bool(row["perplexities"]) for row in rows] == [True, False]
    assert rows[1]["best"] == []


def test_mistakes(at):
    with pytest.raises(OptionError, match="at least 2"):
        eckart.compare(["A"])
    with pytest.raises(OptionError, match="is there twice"):
        eckart.compare(["A", "B", "../" + Path.cwd().name + "/A"])
    with pytest.raises(CheckpointError, match="dense: not a checkpoint"):
        eckart.compare(["A", "dense"])
    with pytest.raises(OptionError, match="is about D, which is none of the models compared"):
        eckart.compare(["A", "B"], results=at(result("D", 3.0)))
    with pytest.raises(OptionError, match=r"two results on x\.txt whose windows differ"):
        eckart.compare(["A", "B"], results=at(result("A", 3.0), result("A", 3.0, windows=9)))


def test_rows_of_one_model_are_checked_against_every_other():
    rows = [{"folder": n, "decoding": None, "perplexities": {"x": result(n, 2.0)["results"][0]}} for n in "ABCD"]
    check_protocols(rows)
    for victim in itertools.islice(rows, 1, None):
        kept, victim["perplexities"] = victim["perplexities"], {"x": result("", 2.0, length=9)["results"][0]}
        with pytest.raises(OptionError, match=f"A and {victim['folder']} were"):
            check_protocols(rows)
        victim["perplexities"] = kept


def test_measuring_here_is_what_evaluate_says(at):
    made = eckart.compare(["A", "B"], data_specs=["x.txt"], against="dense", windows=2, length=24)
    expected = eckart.evaluate("B", against="dense", data_specs=["x.txt"], windows=2, length=24)["results"][0]
    assert made["models"][1]["perplexities"]["x.txt"] == expected


def test_the_command_and_its_page(at, monkeypatch, capsys, tmp_path):
    paths = at(result("A", 3.0), result("B", 3.5), result("C", 3.2), bench("A", 1.1), bench("C", 1.6))
    argv = ["eckart", "compare", "A", "B", "C", *(word for path in paths for word in ("--results", str(path)))]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    assert run("--out", str(tmp_path / "page.html")) == 0
    shown = capsys.readouterr().out
    assert re.search(r"A +svd +\S+% .* 3\.00 .*size speed", shown)
    assert re.search(r"B +svd .* 3\.50 .*-", shown)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert page.count('<circle class="dot') == 3 + 2
    assert page.count('class="dot best"') == 2 + 2
    assert not re.search(r"(src|href)\s*=|url\(|<script", page)
    assert run("--json") == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 3
