"""What parts of a plan cost, against plain code: whole models with some layers replaced by their cut weights."""

import pytest
import torch
from torch import nn

from eckart.measuring.held_out import HeldOut
from eckart.measuring.probes import measure_parts
from eckart.model.discovery import discover
from eckart.model.factorise import factorized_layers
from eckart.portable.linear import weight_view
from eckart.testing import tiny_models
from eckart.types import Entry, Factors, Group

RANK = 3
FAMILIES = ["llama", "gpt2", "opt"]  # rotary, transposed weights, learned positions


def cut(weight):
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :RANK] * s[:RANK]).float(), v[:RANK].float()


def cuts_of(model):
    """The layers of one group, from the weights of the model."""

    def layers(group, entry):
        if entry.rank is None:
            return {}
        left, right = cut(weight_view(model.get_submodule(group.name)))
        return factorized_layers(model, group, Factors(right, (left,)))

    return layers


@pytest.fixture
def windows():
    return torch.randint(3, 128, (4, 20), generator=torch.Generator().manual_seed(1))


def setting(family, windows):
    model = tiny_models()[family]()
    layout = discover(model)
    groups = [Group((target,)) for target in layout.targets]
    entries = [Entry(g.names, None if "v_proj" in g.name else RANK) for g in groups]
    return model, groups, (model, groups, entries, cuts_of(model), HeldOut(model, layout, windows, True))


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
def test_a_part_costs_what_a_whole_model_says(family, windows):
    _, groups, plan = setting(family, windows)
    names = [group.name for group in groups if "v_proj" not in group.name]
    parts = [[n for n in names if "1." in n], [n for n in names if n.endswith(names[-1][-6:])], names[:1], names]
    for part, found in zip(parts, measure_parts(*plan, parts), strict=True):
        assert found == pytest.approx(plain_kl(family, part, windows), rel=1e-3)


def test_the_model_stays_as_it_was(windows):
    model, groups, plan = setting("llama", windows)
    before = dict(model.named_modules())
    measure_parts(*plan, [[group.name] for group in groups])
    assert all(before[name] is module for name, module in model.named_modules())
    assert all(isinstance(model.get_submodule(group.name), nn.Linear) for group in groups)
