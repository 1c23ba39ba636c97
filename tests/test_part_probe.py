"""What parts of a plan cost, against plain code: whole models with some layers replaced by their cut weights."""

import pytest
import torch
from torch import nn

from eckart.discovery import discover
from eckart.factorizing import factorize_
from eckart.held_out import HeldOut
from eckart.linear import weight_view
from eckart.part_probe import PartProbe
from eckart.testing import tiny_models
from eckart.types import Entry, Group

RANK = 3
FAMILIES = ["llama", "gpt2", "opt"]  # rotary, transposed weights, learned positions


def cut(weight):
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]).float(), v[:RANK].float()


def put(model, group, entry):
    for name in group.names:
        left, right = cut(weight_view(model.get_submodule(name)).detach())
        factorize_(model, name, right, left)


@pytest.fixture
def windows():
    return torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(1))


def probe_of(family, windows):
    model = tiny_models()[family]()
    layout = discover(model)
    groups = [Group((target,)) for target in layout.targets]
    entries = [Entry(g.names, None if "v_proj" in g.name else RANK) for g in groups]
    return model, groups, PartProbe(model, groups, entries, put, HeldOut(model, layout, windows, True))


@torch.no_grad()
def plain_kl(family, names, windows):
    """Of a fresh model with dense layers whose weights are the cut products, from its logits."""
    dense, other = tiny_models()[family](), tiny_models()[family]()
    for name in names:
        left, right = cut(weight_view(other.get_submodule(name)).detach())
        weight_view(other.get_submodule(name)).copy_(left @ right)
    p, q = (m(input_ids=windows[:, :-1], use_cache=False).logits.double().log_softmax(-1) for m in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_alone_and_last_are_what_whole_models_say(family, windows):
    _, groups, probe = probe_of(family, windows)
    names = [group.name for group in groups if "v_proj" not in group.name]
    parts = [[n for n in names if "1." in n], [n for n in names if n.endswith(names[-1][-6:])], names[:1], names]
    whole = plain_kl(family, names, windows)
    for part, alone, last in zip(parts, probe.alone(parts), probe.last(parts), strict=True):
        assert alone == pytest.approx(plain_kl(family, part, windows), rel=1e-3)
        without = plain_kl(family, [n for n in names if n not in part], windows)
        assert last == pytest.approx(whole - without, rel=1e-3, abs=1e-6)


def test_a_fair_share_is_the_mean_and_never_below_half_of_what_the_part_costs_alone(windows, monkeypatch):
    _, _, probe = probe_of("llama", windows)
    monkeypatch.setattr(probe, "alone", lambda parts: [0.4, 0.4])
    monkeypatch.setattr(probe, "last", lambda parts: [0.2, -0.1])
    assert probe.fair([["a"], ["b"]]) == pytest.approx([0.3, 0.2])


def test_the_model_stays_as_it_was(windows):
    model, groups, probe = probe_of("llama", windows)
    before = dict(model.named_modules())
    probe.fair([[group.name] for group in groups])
    assert all(before[name] is module for name, module in model.named_modules())
    assert all(isinstance(model.get_submodule(group.name), nn.Linear) for group in groups)
