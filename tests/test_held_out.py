"""The KL of the model of now against plain code in float64, for plain heads and others, and nothing for no change."""

import pytest
import torch
from conftest import factorize_all_

from eckart.errors import NumericalError
from eckart.measuring.held_out import LENGTH, WINDOWS, HeldOut
from eckart.model.discovery import discover
from eckart.testing import tiny_model, tiny_models, tiny_tokenizer
from eckart.text.data import Windows, load_windows

OPTIONS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
MODELS = {**tiny_models(), "gemma2": lambda: tiny_model("Gemma2", **OPTIONS)}  # whose logits are capped


@pytest.fixture
def windows():
    """`[5, 21]` token ids."""
    return torch.randint(4, 99, (5, 21), generator=torch.Generator().manual_seed(0))


def log_p(model, windows):
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("family", MODELS)
def test_it_is_the_mean_over_the_tokens_that_have_a_next_one(family, windows):
    model = MODELS[family]()
    held, dense = HeldOut(model, discover(model), windows, unseen=True), log_p(model, windows)
    assert held.kl() == 0.0
    factorize_all_(model, 0.7)
    cut = log_p(model, windows)
    assert held.kl() == pytest.approx(float((dense.exp() * (dense - cut)).sum(-1).mean()), rel=1e-6)


def test_nan_is_an_error_and_not_a_number(windows):
    model = MODELS["llama"]()
    held = HeldOut(model, discover(model), windows, unseen=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="KL divergence"):
        held.kl()


def test_which_windows(tmp_path):
    """Spare ones where there are any, else the last that were calibrated on; never more than it is worth."""
    (tmp_path / "text.txt").write_text("Nothing was calibrated on this text, or so it is hoped. " * 400)
    model = MODELS["gpt2"]()
    read = load_windows(str(tmp_path / "text.txt"), tiny_tokenizer(), windows=12, length=30, spare=3)
    made = HeldOut.of(model, discover(model), read)
    assert made.to_dict() == {"windows": 3, "length": 30, "unseen": True}
    assert torch.equal(torch.cat(made.stream().batches), read.unseen[:, :-1])
    made = HeldOut.of(model, discover(model), Windows(read.ids, read.tail, read.recipe, read.unseen[:0]))
    assert made.to_dict() == {"windows": WINDOWS, "length": 30, "unseen": False}
    assert torch.equal(torch.cat(made.stream().batches), read.ids[-WINDOWS:, :-1])
    long = load_windows(str(tmp_path / "text.txt"), tiny_tokenizer(), windows=1, length=LENGTH + 9, spare=1)
    model = tiny_model("Llama", **{**OPTIONS, "max_position_embeddings": 512})
    assert HeldOut.of(model, discover(model), long).length == LENGTH
