"""`eval` says the KL divergence beside perplexity: nats per token, the dense model first, over all predicted tokens."""

import math

import pytest
import torch

import eckart
from eckart.errors import OptionError
from eckart.tiny import tiny_model, tiny_models, tiny_tokenizer

TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (400,), generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def row_of(model, dense, text, **options):
    found = eckart.evaluate(model, against=dense, data_specs=[text], tokenizer=tiny_tokenizer(), **options)
    return found["results"][0]


@torch.no_grad()
def plain(model, dense, windows):
    """The divergence by its definition, a sum over the vocabulary, for each predicted token."""
    of_windows = []
    for window in windows:
        p, q = (m(input_ids=window[None]).logits[0, :-1].double().softmax(-1) for m in (dense, model))
        of_windows.append((p * (p.log() - q.log())).sum(-1))
    return of_windows


def test_it_is_the_definition(make, text):
    dense, model = tiny_models()["llama"](), make("llama")
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = [ids[i : i + 32] for i in range(0, 96, 32)]
    tokens = torch.cat(plain(model, dense, windows))
    row = row_of(model, dense, text, windows=3, length=32)
    assert row["kl"] == pytest.approx(float(tokens.mean()), rel=1e-4)
    assert row["kl"] > 0.01
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))


def test_of_the_dense_model_itself_it_is_nothing(text):
    dense = tiny_models()["llama"]()
    row = row_of(dense, tiny_models()["llama"](), text, windows=2, length=32)
    assert row["kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["perplexity"] == row["dense_perplexity"]


def test_the_mean_is_the_protocols(make, text):
    dense, model = tiny_models()["llama"](), make("llama")
    row = row_of(model, dense, text, length=32, mean="window")  # a shorter last window
    ids = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = [ids[i : i + 32] for i in range(0, len(ids), 32)]
    expected = torch.stack([tokens.mean() for tokens in plain(model, dense, windows)]).mean()
    assert row["kl"] == pytest.approx(float(expected), rel=1e-4)


def test_without_a_dense_model_there_is_none(make, text):
    assert "kl" not in row_of(make("llama"), None, text, windows=2, length=32)


def test_another_vocabulary_is_refused(make, text):
    other = tiny_model("Llama", num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=130)
    with pytest.raises(OptionError, match="vocabulary of 130 tokens, but the model one of 128"):
        row_of(make("llama"), other, text, windows=2, length=32)
