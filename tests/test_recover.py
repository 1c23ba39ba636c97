"""Recovery: lower divergence on text it has not seen, nothing but factors changed, and rolled back when it fails."""

from dataclasses import replace

import pytest
import torch

from eckart.errors import NumericalError, OptionError
from eckart.model.discovery import discover
from eckart.model.operators import dense_again
from eckart.plans.plan import Plan
from eckart.portable.linear import weight_view
from eckart.refiners.base import Refinement
from eckart.refiners.recover import Recover, recut
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.text.self_text import write_windows
from eckart.types import Entry


@torch.no_grad()
def text_of(dense, count=32, length=16, seed=0):
    """Text that the model would write: what predicts it better is nearer to the model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (count, 1), generator=generator)
    while ids.shape[1] < length:
        likely = (20 * dense(input_ids=ids, use_cache=False).logits[:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], 1)
    return ids


def recover(**options):
    """On the calibration windows alone, unless asked."""
    return Recover(**{"written": 0, "epochs": 3, **options})


def work_on(family, make, share=0.6):
    dense = tiny_models()[family]()
    layout = discover(dense)
    weights = {t.name: weight_view(dense.get_submodule(t.name)).clone() for t in layout.targets}
    plan = Plan(tuple(Entry((name,), 1) for name in weights))
    return dense, Refinement(make(family, share), layout, plan, weights, text_of(dense))


@torch.no_grad()
def kl(dense, model, windows):
    p, q = (m(input_ids=windows, use_cache=False).logits.double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_divergence_falls_and_all_else_stays(family, make):
    dense, work = work_on(family, make)
    model, held = work.model, work.windows[-4:]
    frozen = {n: p.clone() for n, p in model.named_parameters() if "basis" not in n and "coefficients" not in n}
    before = kl(dense, model, held)
    recover(learning_rate=1e-2).refine_(work)
    assert kl(dense, model, held) < 0.98 * before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_rate_goes_with_the_scale_of_a_factor_and_the_root_of_the_distance(make):
    """The first step of Adam moves an entry by the rate, whatever its gradient."""
    dense, work = work_on("llama", make)
    work = replace(work, unseen=text_of(dense, 4, seed=9))
    distance = kl(dense, work.model, work.unseen)
    assert 0.1 < distance < 0.9  # so that neither 1 nor the distance itself would do for its root
    before = {n: p.detach().clone() for n, p in work.model.named_parameters() if "basis" in n or "coefficients" in n}
    scales = {n: float(p.norm() / p.numel() ** 0.5) for n, p in before.items()}
    assert max(scales.values()) > 2 * min(scales.values())
    recover(epochs=1, windows_per_step=len(work.windows), learning_rate=1e-2).refine_(work)
    assert work.notes[0]["kept_epoch"] == 1
    for name, scale in scales.items():
        moved = float((work.model.get_parameter(name).detach() - before[name]).abs().max())
        assert moved == pytest.approx(1e-2 * distance**0.5 * scale, rel=0.01), name


def test_what_does_not_help_is_rolled_back(make):
    _, work = work_on("llama", make)
    before = {n: p.clone() for n, p in work.model.named_parameters()}
    recover(learning_rate=5.0).refine_(work)
    assert all(torch.equal(p, before[n]) for n, p in work.model.named_parameters())


@torch.no_grad()
def next_token_loss(model, windows):
    return float(model(input_ids=windows, labels=windows, use_cache=False).loss)


def test_it_is_judged_on_text_that_no_statistic_has_seen(make):
    dense, work = work_on("llama", make)
    work = replace(work, unseen=text_of(dense, 3, seed=9))
    before = kl(dense, work.model, work.unseen), next_token_loss(work.model, work.unseen)
    recover(learning_rate=3e-2, epochs=4).refine_(work)
    (note,) = work.notes
    assert (note["kl"][0], note["loss"][0]) == pytest.approx(before, rel=1e-4)
    assert len(note["kl"]) == len(note["loss"]) == 5
    assert note["kept_epoch"] == note["loss"].index(min(note["loss"]))
    assert min(note["loss"]) == pytest.approx(next_token_loss(work.model, work.unseen), rel=1e-4)


def test_one_window_alone_cannot_be_judged_on_and_is_left(make, caplog):
    _, work = work_on("llama", make)
    before = {n: p.clone() for n, p in work.model.named_parameters()}
    recover(written=2).refine_(replace(work, windows=work.windows[:1]))
    assert all(torch.equal(p, before[n]) for n, p in work.model.named_parameters())
    assert "one window" in caplog.text


def test_the_rate_rises_and_falls_to_zero():
    rate = recover(warm_up=0.1)._rate(100)
    assert rate(0) == pytest.approx(0.1)
    assert max(map(rate, range(100))) == pytest.approx(rate(9), abs=0.03)
    assert rate(100) == pytest.approx(0, abs=1e-12)


@pytest.fixture
def trained_on(monkeypatch):
    """The windows of each step of any model, in order."""
    seen = []
    forward = type(tiny_models()["llama"]()).forward

    def listening(self, *args, **kwargs):
        if torch.is_grad_enabled():
            seen.extend(kwargs["input_ids"].tolist())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny_models()["llama"]()), "forward", listening)
    return seen


def test_every_epoch_cuts_the_text_anew(make, trained_on):
    _, work = work_on("llama", make)
    train = work.windows[:28]  # an eighth is held out
    recover(epochs=2).refine_(work)
    half = train.shape[1] // 2
    shifted = torch.cat([train.flatten()[half:], train.flatten()[:half]]).reshape(train.shape)
    assert sorted(trained_on[:28]) == sorted(train.tolist())
    assert sorted(trained_on[28:]) == sorted(shifted.tolist())
    assert torch.equal(recut(train, 0), train)
    assert recut(torch.arange(6).reshape(2, 3), 1).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_text_that_the_dense_model_writes_is_trained_on_besides(make, trained_on):
    dense, work = work_on("llama", make)
    work = replace(work, tokenizer=tiny_tokenizer())
    recover(epochs=1, written=5).refine_(work)
    expected = write_windows(dense, tiny_tokenizer(), [], 5, work.windows.shape[1], torch.Generator().manual_seed(0))
    assert sorted(trained_on) == sorted(work.windows[:28].tolist() + expected.tolist())


def test_text_of_its_own_needs_a_tokenizer(make):
    _, work = work_on("llama", make)
    with pytest.raises(OptionError, match="tokenizer"):
        recover(written=1).refine_(work)


def test_labels_fit_the_text_and_leave_the_dense_model(make):
    """On text that the dense model would not write: alike in all but the weight of its labels."""
    found = {}
    for weight in (0.0, 3.0):
        dense, work = work_on("llama", make)
        shuffled = text_of(dense).flatten()[torch.randperm(32 * 16, generator=torch.Generator().manual_seed(1))]
        work = replace(work, windows=shuffled.reshape(32, 16) % 8 + 3)  # eight tokens, in no order
        recover(learning_rate=3e-2, label_weight=weight).refine_(work)
        found[weight] = next_token_loss(work.model, work.windows[-4:]), kl(dense, work.model, work.windows[-4:])
    assert found[3.0][0] < found[0.0][0] - 0.1
    assert found[3.0][1] > found[0.0][1]


def test_the_dense_model_comes_back_for_a_while(make):
    dense, work = work_on("gpt2", make)
    before = kl(dense, work.model, work.windows)
    with dense_again(work.model, work.dense_weights):
        assert kl(dense, work.model, work.windows) < 1e-9
    assert kl(dense, work.model, work.windows) == before > 0.01


def test_two_runs_agree(make):
    states = []
    for _ in range(2):
        _, work = work_on("llama", make)
        recover(learning_rate=3e-2, epochs=1).refine_(work)
        states.append(work.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"held_out": 1.0},
        {"warm_up": 1.0},
        {"label_weight": -1.0},
        {"written": -1},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(OptionError, match=r"recover\."):
        recover(**options)


def test_a_loss_beyond_numbers_says_whether_training_made_it(make):
    _, work = work_on("llama", make)
    with pytest.raises(
        NumericalError,
        match=r"^recover: the held-out loss is NaN or infinite after training; lower recover\.learning_rate\.$",
    ):
        recover(learning_rate=1e30, epochs=1).refine_(work)
    _, work = work_on("llama", make)
    with torch.no_grad():
        work.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(
        NumericalError, match=r"^recover: the held-out loss is NaN or infinite before any step; check the model\.$"
    ):
        recover().refine_(work)
