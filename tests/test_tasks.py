"""Tasks of the LM Evaluation Harness on local files, against log-likelihoods summed by hand."""

import json
import math

import pytest
import torch
from conftest import factorize_all_

import eckart
from eckart.checkpoints import checkpoint
from eckart.errors import DataError, OptionError
from eckart.evaluation.tasks import PAPERS, make_run
from eckart.testing import tiny_models, tiny_tokenizer

CHOICES = [
    {"question": f"which of {word}?", "choices": [f"the {a}", f"a {b} thing", "no"], "answer": n % 3}
    for n, (word, a, b) in enumerate(
        [
            ("red", "cat", "blue"),
            ("ten", "dog", "old"),
            ("sea", "hat", "new"),
            ("sun", "cup", "big"),
            ("ice", "pen", "z"),
        ]
        * 4
    )
]
TEXTS = ["one two three", "the cat sat on the mat", "rain falls down on a tin roof"]
YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{rest}
metadata:
  version: 3.0
"""
MULTIPLE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity"""


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder with two tasks, and two models: dense and factorised."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows, rest in (
        ("local_choice", CHOICES, MULTIPLE),
        ("local_text", [{"text": t} for t in TEXTS], ROLLING),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=folder / f"{name}.jsonl", rest=rest))
    return folder


def log_likelihood(model, ids, first):
    """Sum of log p(ids[i] | ids[:i]) over i >= first."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(first, len(ids)))


def characters(text):
    return [ord(c) - 32 + 4 for c in text]  # the tiny tokenizer: four special tokens, then printable ASCII


def right_answers(model, normalised):
    right = []
    for row in CHOICES:
        scores = []
        for choice in row["choices"]:
            context = [1, *characters(row["question"])]
            score = log_likelihood(model, context + characters(" " + choice), len(context))
            scores.append(score / len(choice) if normalised else score)
        right.append(scores.index(max(scores)) == row["answer"])
    return right


@pytest.mark.slow
def test_both_kinds_of_task_dense_beside_compressed(local, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    models = {"dense": tiny_models()["llama"](), "small": factorize_all_(tiny_models()["llama"](), 0.3)}
    models["dense"].save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    checkpoint.save(models["small"], tmp_path / "small", tokenizer=tiny_tokenizer(), provenance={"by": "hand"})
    result = eckart.evaluate(
        tmp_path / "small",
        against=tmp_path / "dense",
        task_names=["local_choice", "local_text"],
        include_path=local,
    )
    choice, text = sorted(result["tasks"], key=lambda row: row["task"])
    for key, model in (("metrics", models["small"]), ("dense_metrics", models["dense"])):
        for metric, normalised in (("acc", False), ("acc_norm", True)):
            right = right_answers(model, normalised)
            share = sum(right) / len(right)
            assert choice[key][metric]["value"] == pytest.approx(share)
            deviation = math.sqrt(share * (1 - share) / (len(right) - 1))
            assert choice[key][metric]["stderr"] == pytest.approx(deviation)
            assert choice[key][metric]["higher_is_better"] is True
        # The harness begins with one BOS, and the tokenizer with another.
        total = sum(log_likelihood(model, [1, 1, *characters(t)], 1) for t in TEXTS)
        words = sum(len(t.split()) for t in TEXTS)
        assert text[key]["word_perplexity"]["value"] == pytest.approx(math.exp(-total / words), rel=1e-4)
        assert text[key]["word_perplexity"]["stderr"] is None
    assert {m["acc"]["value"] for m in (choice["metrics"], choice["dense_metrics"])} != {0.0, 1.0}
    assert result["results"] == []
    assert result["provenance"]["by"] == "hand"
    assert choice["protocol"]["documents"] == len(CHOICES)
    assert choice["protocol"]["shots"] == 0
    assert choice["protocol"]["task_version"] == 3.0
    assert choice["protocol"]["dtype"] == "float32"
    assert json.loads(json.dumps(result)) == result


@pytest.mark.slow
def test_limit_beside_a_corpus_and_what_can_go_wrong(local, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    (tmp_path / "text.txt").write_text("all work and no play " * 20)
    options = {"tokenizer": tiny_tokenizer(), "include_path": local}
    result = eckart.evaluate(
        tiny_models()["llama"](), task_names=["local_choice"], limit=7, windows=2, length=20,
        data_specs=[str(tmp_path / "text.txt")], **options,
    )  # fmt: skip
    assert result["tasks"][0]["protocol"]["documents"] == 7
    assert result["tasks"][0]["protocol"]["documents_in_all"] == len(CHOICES)
    assert result["results"][0]["windows"] == 2
    assert "dense_metrics" not in result["tasks"][0]
    with pytest.raises(OptionError, match="unknown task 'local_choise'; did you mean 'local_choice'"):
        eckart.evaluate(tiny_models()["llama"](), task_names=["local_choise"], **options)
    (local / "local_text.jsonl").unlink()
    with pytest.raises(DataError, match="tasks local_text: cannot be run"):
        eckart.evaluate(tiny_models()["llama"](), task_names=["local_text"], **options)


def test_requests():
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    assert make_run(["papers", "piqa", "boolq"], None, 5).names == (*PAPERS, "boolq")
    assert len(PAPERS) == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], "folder", None), "include_path names a folder of tasks, but no task"),
        (([], None, 3), "limit is 3, but must be at least 1 and needs tasks"),
        ((["piqa"], None, 0), "limit is 0, but must be at least 1"),
        ((["piqa"], "no/such/folder", None), "no such folder"),
    ],
)
def test_wrong_requests(given, message):
    with pytest.raises(OptionError, match=message):
        make_run(*given)


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("eckart.support.extras.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"eval with tasks needs lm_eval.*pip install 'eckart\[eval\]'"):
        make_run(["piqa"], None, None)
