"""The walk gives the model's own states, for any number of streams, forward and backward; operators see what passes."""

import pytest
import torch

from eckart.model.discovery import discover
from eckart.model.operators import dense_again, operator
from eckart.model.residence import InMemory, residence_of
from eckart.model.store import Store
from eckart.model.walk import open_stream, pass_blocks, replaced, run_tail, split_batches, walk
from eckart.portable.linear import weight_view
from eckart.tiny import tiny_models

WINDOWS = torch.randint(4, 99, (4, 12), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.parametrize("family", sorted(tiny_models()))


def opened(family, batch_tokens=24):
    model = tiny_models()[family]()
    layout = discover(model)
    residence = residence_of(model, layout)
    return model, layout, residence, open_stream(model, residence, split_batches(WINDOWS, batch_tokens))


@torch.no_grad()
def test_states_and_logits_are_the_models_own(family):
    model, _, residence, stream = opened(family)
    seen = []
    hooks = [b.register_forward_hook(lambda _, i, o: seen.append(o[0] if isinstance(o, tuple) else o)) for b in
             residence.structure]  # fmt: skip
    expected = model(input_ids=WINDOWS[:2]).logits
    own = list(seen)
    for hook in hooks:
        hook.remove()
    for at in walk(residence, stream):
        at.advance(stream)
        assert torch.allclose(stream.states[0], own[at.index], atol=1e-6)
        assert stream.position == at.index + 1
    assert torch.allclose(run_tail(model, residence, stream, 0).logits, expected, atol=1e-5)


@torch.no_grad()
def test_what_the_caller_does_not_move_the_walk_moves_and_branches_go_their_own_way(family):
    _, _, residence, stream = opened(family)
    start = stream.branch()
    late = None
    for at in walk(residence, stream):
        if at.index == 1:
            late = stream.branch()
    assert late is not None
    assert stream.position == len(residence) == 2
    assert (start.position, late.position) == (0, 1)
    pass_blocks(residence, late)
    pass_blocks(residence, start)
    for other in (start, late):
        assert all(torch.equal(a, b) for a, b in zip(other.states, stream.states, strict=True))


def test_backward_the_blocks_come_from_the_last_and_no_stream_moves(family):
    _, _, residence, stream = opened(family)
    assert [at.index for at in walk(residence, stream, backward=True)] == [1, 0]
    assert stream.position == 0
    assert [at.index for at in walk(residence, first=1)] == [1]


def test_blocks_are_asked_of_the_residence_one_at_a_time(family, monkeypatch):
    """Whoever holds the weights may take them back when the walk moves on."""
    model, layout, _, _ = opened(family)
    asked, held = [], []

    class Lending(InMemory):
        def block(self, index):
            asked.append(index)
            return self._lend(index)

        from contextlib import contextmanager

        @contextmanager
        def _lend(self, index):
            held.append(index)
            assert len(held) == 1, "two blocks at once"
            yield self.structure[index]
            held.pop()

    residence = Lending(model, layout)
    stream = open_stream(model, residence, split_batches(WINDOWS))
    asked.clear()
    pass_blocks(residence, stream)
    assert asked == [0, 1]


def test_progress_counts_blocks(family):
    _, _, residence, stream = opened(family)
    said = []
    pass_blocks(residence, stream, "a stage", lambda *what: said.append(what))
    assert said == [("a stage", 0, 2), ("a stage", 1, 2), ("a stage", 2, 2)]


@torch.no_grad()
def test_operators_tell_weight_bias_and_what_passes(family):
    model, layout, _, _ = opened(family)
    for target in layout.targets[:3]:
        view = operator(model, target.name)
        assert view.shape == (target.out_features, target.in_features)
        assert view.weight.data_ptr() == model.get_submodule(target.name).weight.data_ptr()
        assert (view.bias is not None) == target.has_bias
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handles = view.listen(lambda x, y, seen=seen: seen.append((x, y)))
        model(input_ids=WINDOWS[:1])
        for handle in handles:
            handle.remove()
        model(input_ids=WINDOWS[:1])
        ((x, y),) = seen
        expected = torch.nn.functional.linear(x, view.weight, view.bias)
        assert torch.allclose(y, expected, atol=1e-5)


@torch.no_grad()
def test_dense_weights_come_back_for_a_while(family):
    model, layout, _, _ = opened(family)
    expected = model(input_ids=WINDOWS[:1]).logits
    dense = {t.name: weight_view(model.get_submodule(t.name)).clone() for t in layout.targets}
    for target in layout.targets:
        weight_view(model.get_submodule(target.name)).mul_(0.5)
    changed = model(input_ids=WINDOWS[:1]).logits
    with dense_again(model, dense):
        assert torch.allclose(model(input_ids=WINDOWS[:1]).logits, expected, atol=1e-5)
    assert torch.equal(model(input_ids=WINDOWS[:1]).logits, changed)


def test_replaced_layers_go_back_when_something_fails(family):
    model, layout, _, _ = opened(family)
    name = layout.targets[0].name
    before = model.get_submodule(name)
    with pytest.raises(RuntimeError), replaced(model, {name: torch.nn.Identity()}):
        raise RuntimeError
    assert model.get_submodule(name) is before


def test_a_copy_of_a_store_is_its_own(family):
    store = Store([torch.zeros(1), torch.ones(1)])
    other = store.copy()
    other[0] = torch.ones(1)
    assert float(store[0]) == 0
    assert len(other) == 2
