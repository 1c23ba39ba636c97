"""Which targets come to share a basis."""

from types import SimpleNamespace

import pytest
import torch

from eckart.errors import OptionError
from eckart.model.discovery import discover
from eckart.planning.decomposed import decompose
from eckart.plans.grouping import READERS, Grouping, auto_size, make_groups
from eckart.recipes import find
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.testing import tiny_model, tiny_models
from eckart.types import Target


def blocks_of(count, **kinds):
    """`count` blocks with the kinds as `name=(out, in)`."""
    return [Target(f"b.{i}.{kind}", i, kind, *shape, False) for i in range(count) for kind, shape in kinds.items()]


def names(groups):
    return [group.names for group in groups]


def test_size_1_shares_nothing():
    targets = blocks_of(3, q_proj=(8, 8), down_proj=(8, 8))
    assert names(make_groups(targets, 1, READERS)) == [(target.name,) for target in targets]


def test_readers_are_grouped_in_order_and_writers_stay_private():
    targets = blocks_of(3, q_proj=(8, 8), o_proj=(8, 8), up_proj=(16, 8), down_proj=(8, 16))
    assert names(make_groups(targets, 2, READERS)) == [
        ("b.0.q_proj", "b.1.q_proj"),
        ("b.0.o_proj",),
        ("b.0.up_proj", "b.1.up_proj"),
        ("b.0.down_proj",),
        ("b.1.o_proj",),
        ("b.1.down_proj",),
        ("b.2.q_proj",),  # the last, smaller group
        ("b.2.o_proj",),
        ("b.2.up_proj",),
        ("b.2.down_proj",),
    ]


def test_a_group_ends_where_the_shape_changes():
    targets = [Target(f"b.{i}.q_proj", i, "q_proj", out, 8, False) for i, out in enumerate((8, 8, 8, 4, 4, 8))]
    assert [group.out_features for group in make_groups(targets, 2, READERS)] == [16, 8, 8, 8]


def test_every_target_is_in_exactly_one_group():
    targets = blocks_of(7, q_proj=(8, 8), k_proj=(4, 8), down_proj=(8, 16))
    for size in (1, 2, 3, 7, 9):
        groups = make_groups(targets, size, READERS)
        assert sorted(n for g in groups for n in g.names) == sorted(t.name for t in targets)
        assert max(len(g.targets) for g in groups) == min(size, 7)


def test_the_kinds_are_an_option():
    groups = Grouping(2, ("down_proj",)).groups(blocks_of(2, q_proj=(8, 8), down_proj=(8, 16)))
    assert names(groups) == [("b.0.q_proj",), ("b.0.down_proj", "b.1.down_proj"), ("b.1.q_proj",)]
    with pytest.raises(OptionError, match=r"grouping\.kinds is mixer, which matches none of q_proj, down_proj"):
        Grouping(2, ("mixer",)).groups(blocks_of(2, q_proj=(8, 8), down_proj=(8, 16)))


@pytest.mark.parametrize("size", [0, -1, "two"])
def test_impossible_sizes(size):
    with pytest.raises(OptionError, match=r"grouping\.size is .* whole number from 1 on"):
        find("basis-sharing", {"grouping.size": size})


def test_options_from_text():
    made = find("basis-sharing", {"grouping.size": "3", "grouping.kinds": "*q_proj,*k_proj"}).make_grouping()
    assert made == Grouping(3, ("*q_proj", "*k_proj"))


FAMILIES = {  # what is grouped, what is private; told by hand from each family's forward
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    "phi3": {"qkv_proj", "gate_up_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "fc1"},
    "gpt-neox": {"query_key_value", "dense_h_to_4h"},
    "gpt2": {"c_attn", "c_fc"},
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_linears_that_read_the_normalised_input_are_grouped(family):
    groups = make_groups(discover(tiny_models()[family]()).targets, 2, READERS)
    shared = {group.kind.rpartition(".")[2] for group in groups if len(group.targets) == 2}
    assert shared == FAMILIES[family]


@pytest.mark.parametrize(
    ("family", "size"), [("llama", 1), ("qwen3", 1), ("phi3", 1), ("opt", 2), ("gpt2", 2), ("gpt-neox", 2)]
)
def test_auto_is_2_for_multi_head_and_1_for_grouped_queries(family, size):
    assert auto_size(discover(tiny_models()[family]()).targets) == size


def test_auto_of_a_multi_head_llama():
    model = tiny_model("Llama", num_attention_heads=4, num_key_value_heads=4, intermediate_size=64)
    assert auto_size(discover(model).targets) == 2
    assert auto_size(blocks_of(2, mixer=(8, 8))) == 1


def windows():
    return torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))


def test_groups_get_input_grams_and_private_targets_the_smaller_side():
    model = tiny_models()["llama"]()
    layout = discover(model)
    shared = {t.name for t in layout.targets if t.kind.endswith(("q_proj", "v_proj"))}
    found = {}
    for block in sweep(model, layout, windows(), (Need.SMALLER_GRAM,), whole_gram=shared):
        found |= block
    assert all(found[name].input_gram is not None for name in shared)
    assert found["model.layers.0.mlp.down_proj"].input_gram is None


def test_q_k_and_v_of_a_group_share_one_side_of_the_metric():
    model = tiny_models()["opt"]()
    layout = discover(model)
    groups = make_groups(layout.targets, 2, READERS)
    factorizer, sides = find("svd-llm").make_factorizer(), {}

    def watched(group, weights, statistics):
        sides[group.name] = factorizer.metric(torch.cat(list(weights)), statistics).right
        return factorizer.decompose(group, weights, statistics)

    decompose(model, layout, groups, SimpleNamespace(needs=factorizer.needs, decompose=watched), windows())
    q, k, v = (sides[f"model.decoder.layers.0.self_attn.{role}_proj"] for role in "qkv")
    assert q is not None
    assert q is k is v
