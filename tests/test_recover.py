"""Recovery: lower divergence on text it has not seen, nothing but factors changed, and rolled back when it fails."""

import pytest
import torch

from eckart.discovery import discover
from eckart.errors import OptionError
from eckart.linear import weight_view
from eckart.plans import Plan
from eckart.refiners.base import Refinement
from eckart.refiners.recover import Recover, dense_again
from eckart.testing import tiny_models
from eckart.types import Entry


def token_windows(count=12, length=16, seed=0):
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def work_on(family, make, share=0.6):
    dense = tiny_models()[family]()
    layout = discover(dense)
    weights = {t.name: weight_view(dense.get_submodule(t.name)).clone() for t in layout.targets}
    plan = Plan(tuple(Entry((name,), 1) for name in weights))
    return dense, Refinement(make(family, share), layout, plan, weights, token_windows())


@torch.no_grad()
def kl(dense, model, windows):
    p, q = (m(input_ids=windows, use_cache=False).logits.double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_divergence_falls_and_all_else_stays(family, make):
    dense, work = work_on(family, make)
    model, held = work.model, work.windows[-2:]
    frozen = {n: p.clone() for n, p in model.named_parameters() if "basis" not in n and "coefficients" not in n}
    before = kl(dense, model, held)
    Recover(learning_rate=3e-3).refine_(work)
    assert kl(dense, model, held) < 0.98 * before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_does_not_help_is_rolled_back(make):
    _, work = work_on("llama", make)
    before = {n: p.clone() for n, p in work.model.named_parameters()}
    Recover(learning_rate=0.5).refine_(work)
    assert all(torch.equal(p, before[n]) for n, p in work.model.named_parameters())


def test_the_dense_model_comes_back_for_a_while(make):
    dense, work = work_on("gpt2", make)
    before = kl(dense, work.model, work.windows)
    with dense_again(work):
        assert kl(dense, work.model, work.windows) < 1e-9
    assert kl(dense, work.model, work.windows) == before > 0.01


def test_two_runs_agree(make):
    states = []
    for _ in range(2):
        _, work = work_on("llama", make)
        Recover(learning_rate=3e-3, epochs=1).refine_(work)
        states.append(work.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("options", [{"epochs": 0}, {"learning_rate": 0.0}, {"held_out": 1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(OptionError, match=r"recover\."):
        Recover(**options)
