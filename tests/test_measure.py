"""Perplexity against arithmetic done by hand."""

import math
from pathlib import Path

import pytest
import torch

import eckart
from eckart.errors import NumericalError, OptionError
from eckart.measuring.perplexity import perplexity
from eckart.testing import tiny_models, tiny_tokenizer


def by_hand(model, windows):
    """Negative log-probabilities of every next token, one window at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            log_p = model(input_ids=window[None]).logits[0].log_softmax(-1)
        losses.append([-float(log_p[t, window[t + 1]]) for t in range(len(window) - 1)])
    return losses


def test_token_mean_and_window_mean():
    model = tiny_models()["llama"]()
    windows = [torch.arange(4, 34), torch.arange(50, 60)]
    losses = by_hand(model, windows)
    flat = [loss for window in losses for loss in window]
    token = perplexity(model, windows)
    assert token.value == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    assert (token.tokens, token.windows) == (29 + 9, 2)
    means = [sum(window) / len(window) for window in losses]
    assert perplexity(model, windows, mean="window").value == pytest.approx(math.exp(sum(means) / 2), rel=1e-5)
    assert token.value != pytest.approx(perplexity(model, windows, mean="window").value, rel=1e-3)


def test_a_window_that_is_not_finite_fails_instead_of_being_skipped():
    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match="the loss of window 0 is"):
        perplexity(model, [torch.arange(4, 34)])


@pytest.fixture
def corpora(tmp_path):
    for name, text in (("a.txt", "abcdefghij " * 20), ("b.txt", "the cat sat on the mat " * 9)):
        (tmp_path / name).write_text(text)
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_two_corpora_dense_beside_compressed(tmp_path, corpora):
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    eckart.compress(str(tmp_path / "dense"), recipe="svd", keep=0.5, out=tmp_path / "small")
    result = eckart.evaluate(tmp_path / "small", against=tmp_path / "dense", data_specs=corpora, windows=3, length=20)
    assert [row["data"] for row in result["results"]] == corpora
    for row in result["results"]:
        ids = eckart.load_windows(row["data"], tiny_tokenizer(), windows=3, length=20, purpose="evaluation").ids
        assert row["dense_perplexity"] == pytest.approx(perplexity(tiny_models()["llama"](), list(ids)).value)
        assert row["perplexity"] != pytest.approx(row["dense_perplexity"], rel=1e-3)
        assert {"length", "stride", "join", "bos", "mean", "dtype", "tokens_hash"} <= set(row["protocol"])


def test_window_mean_keeps_the_short_tail(corpora):
    model, tokenizer = tiny_models()["llama"](), tiny_tokenizer()
    ids = torch.tensor(tokenizer(Path(corpora[0]).read_text())["input_ids"])
    pieces = list(ids.split(50))
    assert len(pieces[-1]) not in (0, 1, 50)
    options = {"data_specs": corpora[:1], "length": 50, "tokenizer": tokenizer}
    kept = eckart.evaluate(model, mean="window", **options)["results"][0]
    dropped = eckart.evaluate(model, **options)["results"][0]
    assert kept["perplexity"] == pytest.approx(perplexity(model, pieces, mean="window").value)
    assert dropped["perplexity"] == pytest.approx(perplexity(model, pieces[:-1]).value)


def test_wrong_options(corpora):
    with pytest.raises(OptionError, match="mean is 'median'"):
        eckart.evaluate(tiny_models()["llama"](), mean="median", data_specs=corpora)
    with pytest.raises(OptionError, match="pass tokenizer="):
        eckart.evaluate(tiny_models()["llama"](), data_specs=corpora)


def test_another_tokenizer_is_another_text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on a mat " * 100)
    tokenizer = tiny_tokenizer()
    for name in ("model", "same", "other"):
        tiny_models()["llama"]().save_pretrained(tmp_path / name)
        if name == "other":
            tokenizer.add_tokens(["cat"])
        tokenizer.save_pretrained(tmp_path / name)
    where = {"data_specs": [str(tmp_path / "text.txt")], "windows": 1, "length": 16}
    assert eckart.evaluate(tmp_path / "model", against=tmp_path / "same", **where)["results"]
    with pytest.raises(OptionError, match=r"whose tokenizer is not the model's \(1 of its tokens"):
        eckart.evaluate(tmp_path / "model", against=tmp_path / "other", **where)
    for path in (tmp_path / "other").glob("tokenizer*"):
        path.unlink()
    assert eckart.evaluate(tmp_path / "model", against=tmp_path / "other", **where)["results"]


def test_a_model_without_logits_has_no_loss(corpora):
    body = tiny_models()["llama"]().model
    with pytest.raises(
        OptionError, match=r"^LlamaModel gives no logits of a next token, so its losses cannot be measured\.$"
    ):
        eckart.evaluate(body, tokenizer=tiny_tokenizer(), data_specs=corpora, windows=1, length=16)


def test_a_word_that_cannot_be_said_makes_the_divergence_infinite(corpora):
    """The loss of the text is finite, as the text never says it."""
    dense, never = tiny_models()["llama"](), tiny_models()["llama"]()
    head = torch.nn.Linear(32, len(dense.lm_head.weight))
    with torch.no_grad():
        head.weight.copy_(dense.lm_head.weight)
        head.bias.zero_()[-1] = -torch.inf
    never.lm_head = head
    options = {"tokenizer": tiny_tokenizer(), "data_specs": corpora[:1], "windows": 1, "length": 16}
    assert eckart.evaluate(never, **options)["results"][0]["perplexity"] > 0
    with pytest.raises(
        NumericalError, match=r"^the KL divergence from the dense model is NaN or infinite; evaluate in float32\.$"
    ):
        eckart.evaluate(never, against=dense, **options)


def test_a_broken_model_beside_its_dense_one_is_told_by_its_window(corpora):
    broken = tiny_models()["llama"]()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    options = {"tokenizer": tiny_tokenizer(), "data_specs": corpora[:1], "windows": 1, "length": 16}
    with pytest.raises(NumericalError, match=r"^the loss of window 0 is nan; evaluate in float32\.$"):
        eckart.evaluate(broken, against=tiny_models()["llama"](), **options)
