"""The cache goes under the name that the model's forward takes, and is found under the one its output has."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from eckart.model import kv_cache
from eckart.testing import tiny_models
from eckart.timing.subjects import TorchSubject


class Renamed(torch.nn.Module):
    def forward(self, input_ids, cache=None):
        return SimpleNamespace(cache="new")


class Before(torch.nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return SimpleNamespace(past_key_values="old")


class Wrapper(torch.nn.Module):
    def forward(self, *args, **kwargs):
        raise NotImplementedError


def test_the_name_is_the_forwards():
    assert kv_cache.keyword(Renamed()) == "cache"
    assert kv_cache.keyword(Before()) == "past_key_values"


def test_a_wrapper_gets_the_name_that_transformers_models_take():
    assert kv_cache.keyword(Wrapper()) == kv_cache.keyword(tiny_models()["llama"]())


def test_the_cache_of_an_output():
    assert kv_cache.of(Renamed()(0)) == "new"
    assert kv_cache.of(Before()(0)) == "old"
    assert kv_cache.of(SimpleNamespace(logits=0)) is None
    assert kv_cache.of(SimpleNamespace(cache=None)) is None


@pytest.mark.parametrize("family", tiny_models())
def test_a_step_with_the_cache_is_a_longer_prompt(family, ids):
    model = tiny_models()[family]().eval()
    subject = TorchSubject(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, cache = subject.prefill(ids[:, :-1])
        with torch.inference_mode():
            out = model(input_ids=ids[:, -1:], use_cache=True, **{subject.cache_name: cache})
            whole = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(out.logits[:, -1], whole, rtol=0, atol=1e-4)
