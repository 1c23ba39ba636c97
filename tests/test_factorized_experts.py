"""Stacked factors of experts: what they compute against a plain loop, and what they cost."""

import copy
import pickle

import pytest
import torch
from mixtures import MIXTURES
from torch.overrides import TorchFunctionMode

from eckart import ledger
from eckart.model.discovery import discover
from eckart.model.experts import dense_weight, opened
from eckart.model.factorise import factorize_, store_
from eckart.portable.experts import FactorizedExperts, grouped, ranks_in, stacks_in
from eckart.portable.hf import densify_
from eckart.types import Group


def cut_(model, ranks, storage="pair"):
    """Every expert at the rank `ranks(target)`, by the SVD of its weight; None leaves it dense."""
    layout = discover(model)
    with opened(model, layout.targets):
        for target in layout.targets:
            rank = ranks(target) if target.expert is not None else None
            if rank is not None:
                u, s, vt = torch.linalg.svd(dense_weight(model, target), full_matrices=False)
                factorize_(model, target.name, vt[:rank], u[:, :rank] * s[:rank])
                store_(model, target.name, storage)
    return layout


def double(family):
    """In double precision, of which the grouped products of transformers know nothing."""
    model = MIXTURES[family]().double()
    model.set_experts_implementation("eager")
    return model


def full(target):
    return min(target.out_features, target.in_features)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_at_full_rank_a_layer_is_what_it_was(family, tokens):
    model = double(family)
    ids = torch.randint(4, 99, (1, tokens))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        cut_(model, full)
        assert len(list(stacks_in(model))) in (2, 4)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_below_full_rank_it_is_the_layer_of_the_products(family, storage):
    """Three ranks in one stack, one of them full; of pivoted ones both sides are permuted, in different stacks."""
    model, again = double(family), double(family)
    cut_(model, lambda t: (5, None, 9, 5)[t.expert], storage)
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    assert stack.ranks == (5, 0, 9, 5)
    assert {name for name, _ in stack.named_children()} == {"rank_5", "rank_9", "dense"}
    for target in discover(again).targets:
        if target.expert is not None and target.expert != 1:
            weight = dense_weight(again, target)
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            rank = (5, None, 9, 5)[target.expert]
            weight.copy_(u[:, :rank] * s[:rank] @ vt[:rank])
    ids = torch.randint(4, 99, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits, rtol=0, atol=1e-12)
        densify_(model)
        for name, parameter in again.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-12)
        torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits)


def loop(x, weights, counts):
    rows, start = [], 0
    for weight, count in zip(weights, counts.tolist(), strict=True):
        rows += [weight @ row for row in x[start : start + count]]
        start += count
    return torch.stack(rows) if rows else x.new_zeros(0, weights.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(8, 16), (5, 7)])  # rows of whole 16 bytes, and odd ones
@pytest.mark.parametrize("counts", [(3, 0, 4, 1), (0, 0, 1, 0), (0, 9, 0, 0), (0, 0, 0, 0)])
def test_grouped_products_are_those_of_a_loop_and_so_are_their_gradients(dtype, sizes, counts):
    counts = torch.tensor(counts)
    x = torch.randn(int(counts.sum()), sizes[0], dtype=dtype, requires_grad=True)
    weights = torch.randn(4, sizes[1], sizes[0], dtype=dtype, requires_grad=True)
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    y, expected = grouped(x, weights, counts), loop(x, weights, counts)
    torch.testing.assert_close(y, expected, **close)
    if len(x):
        at_y = torch.randn_like(y)
        mine = torch.autograd.grad(y, (x, weights), at_y)
        theirs = torch.autograd.grad(expected, (x, weights), at_y)
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, **close)


class Calls(TorchFunctionMode):
    """Counts what Python asks of torch."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [16, 13])  # a grouped product, and batched ones
def test_nothing_in_a_forward_pass_goes_expert_by_expert(size):
    """As many calls of torch with 64 experts as with 4."""
    counts = []
    for experts in (4, 64):
        stack = FactorizedExperts([size // 2] * experts, size, size)
        rows = (torch.arange(256) % experts).sort().values
        x, each = torch.randn(256, size), torch.full((experts,), 256 // experts)
        with torch.no_grad(), Calls() as calls:
            stack(x, rows, each)
        counts.append(calls.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_a_stack_costs_what_the_ledger_says(storage):
    model = MIXTURES["mixtral"]()
    layout = cut_(model, lambda t: (5, None, 9, 5)[t.expert], storage)
    for name, stack in stacks_in(model):
        own = [t for t in layout.targets if t.name.startswith(f"{name}.")]
        groups, ranks = [Group((t,)) for t in own], (5, None, 9, 5)
        told = sum(ledger.parameters(g, r, storage) for g, r in zip(groups, ranks, strict=True))
        assert sum(p.numel() for p in stack.parameters()) == told
        indices = sum(ledger.index_bytes(g, r, storage) for g, r in zip(groups, ranks, strict=True))
        assert sum(b.nbytes for b in stack.buffers()) == indices
        even = Group(tuple(own), own_bases=True)
        assert ledger.parameters(even, 6, storage) == sum(ledger.parameters(g, 6, storage) for g in groups)
        assert ledger.largest_rank(even, ledger.parameters(even, 6, storage), storage) == 6
        assert ledger.largest_rank(even, ledger.parameters(even, 6, storage) - 1, storage) == 5
        assert ledger.admitted(even, storage) == storage
        assert ledger.admitted(even, "columns") == "pair"


def test_a_factorised_model_is_copied_and_pickled_whole(ids):
    model = MIXTURES["qwen3-moe"]()
    cut_(model, lambda t: 4)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(input_ids=ids).logits, expected)
            other.model.layers[1].mlp.experts.down_proj.rank_4.basis.zero_()
            assert not torch.equal(other(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "ranks", [None, [4, 4, 4], [4, 4, 4, 99], [4, 4, 4, -1], [0, 0, 0, 0], [4, 4, 4, True], "4444"]
)
def test_ranks_that_cannot_be(ranks):
    with pytest.raises(ValueError, match=r"must be 4 whole numbers in \[0, 16\], one for each expert"):
        ranks_in({"ranks": ranks}, 4, 16)


def test_experts_spread_over_devices_are_refused(ids):
    model = MIXTURES["qwen3-moe"]()
    cut_(model, lambda t: 4)
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="cannot be spread over devices"):
        model(input_ids=ids)
