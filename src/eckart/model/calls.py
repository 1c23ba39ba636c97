"""How a model calls its blocks: captured from one real run of the model's own code, and never rebuilt.

Besides hidden states a block gets masks, rotary embeddings and more. Because these arguments are captured, nothing
here depends on the kind of model. What blocks hand to one another beside the states is `eckart.model.carried`.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eckart.errors import ModelError
from eckart.model.carried import Carried, Reads
from eckart.model.forms import Form, form_of

HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends the captured run before the head, whose cost would be wasted."""


@dataclass
class Call:
    """How the model called one block: its arguments, with the hidden states taken out.

    `reads` says which of them other blocks have made, and `form` how the model arranges states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: Reads = field(default_factory=Reads)
    form: Form = field(default_factory=Form)

    def run(self, block: Callable[..., Any], hidden: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The output hidden states, `[batch, seq, width]`, of the block or of its stand-in, and what it carries on.

        `carried` is what the blocks before have left for this one; it stays as it is.
        """
        args, kwargs = self.reads.filled(self.args, self.kwargs, carried)
        states = self.form.native(hidden)
        by_name = HIDDEN in self.kwargs
        output = block(*args, **{**kwargs, HIDDEN: states}) if by_name else block(states, *args, **kwargs)
        return self.form.plain(states_of(output)), self.reads.left(output)


class Skipped(Call):
    """A block that the model leaves out when it runs on token ids alone: states pass it as they are."""

    def __init__(self) -> None:
        super().__init__((), {})

    def run(self, block: Callable[..., Any], hidden: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        return hidden, carried


def states_of(output: Any) -> Tensor:
    """The hidden states of what a block returned: itself, or the first of several things."""
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


@dataclass(frozen=True)
class Returned:
    """The form in which blocks return hidden states, taken from block 0: `around(states)` gives other states that form.

    What else a block returns (biases of attention, caches) is handed on as block 0 gave it; what the next block reads
    of that is carried (`eckart.model.carried`). A model that hands on more, by ways of its own, cannot be walked;
    `eckart.model.walk.prove` finds that out.
    """

    output: Any = None
    form: Form = field(default_factory=Form)

    def around(self, states: Tensor) -> Any:
        """`states` as the model arranges them, in the place of those that block 0 returned."""
        if isinstance(self.output, tuple) and hasattr(self.output, "_fields"):
            return type(self.output)(states, *self.output[1:])
        if isinstance(self.output, tuple | list):
            return type(self.output)([states, *self.output[1:]])
        return states


@dataclass
class Captured:
    """What was captured from one run of the model.

    `hidden[i]` `[batch, seq, width]` enters block 0 of batch i, which calls block b by `calls[i][b]`; `returned` is
    what a block returns; `carried[i]` is what block 0 finds beside the states.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    returned: Returned
    carried: list[Carried]


@torch.no_grad()
def capture(model: nn.Module, blocks: Iterable[nn.Module], batches: Sequence[Tensor]) -> Captured:
    """Run the model up to its first block on every batch, `[batch, length]` token ids, and capture every block's call.

    Only the embeddings really run, and block 0, to see what a block returns. Raises `ModelError` for a model that runs
    a block twice, out of order, or none.
    """
    blocks = list(blocks)
    name = type(model).__name__
    form = form_of(batches[0], lambda ids: _states_at_entrance(model, blocks, ids), name)
    captured, interned = Captured([], [], Returned(), []), _Interned()
    for batch in batches:
        stand_in = _Capture(interned, form, len(blocks), captured.returned)
        with forwards_replaced(blocks, stand_in.fake), suppress(_Stop):
            model(input_ids=batch, use_cache=False)
        _check_order(name, stand_in.order)
        captured.hidden.append(stand_in.hidden)
        captured.calls.append(stand_in.finished(len(blocks)))
        captured.carried.append(Carried.before_the_first(stand_in.shared))
        captured.returned = stand_in.returned
    return captured


def _check_order(name: str, order: Sequence[int]) -> None:
    """Blocks run in order, once each; some may be left out, as those that look at images are."""
    if sorted(set(order)) != list(order):
        said = ", ".join(map(str, order[:8])) + (", ..." if len(order) > 8 else "")
        raise ModelError(f"{name}: runs its blocks in the order {said}; eckart needs each to run once, in order.")


def _states_at_entrance(model: nn.Module, blocks: Sequence[nn.Module], ids: Tensor) -> Tensor | None:
    """The hidden states that enter the first block that runs, as the model arranges them; None if none does."""
    found: list[Tensor] = []

    def fake(index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            found.append(kwargs[HIDDEN] if HIDDEN in kwargs else args[0])
            raise _Stop

        return forward

    with forwards_replaced(blocks, fake), suppress(_Stop):
        model(input_ids=ids, use_cache=False)
    return found[0] if found else None


class _Capture:
    """Stands in for the blocks during one batch's run: keeps each call and passes the hidden states on."""

    def __init__(self, interned: "_Interned", form: Form, blocks: int, returned: Returned) -> None:
        self.interned, self.form, self.last, self.returned = interned, form, blocks - 1, returned
        self.calls: dict[int, Call] = {}
        self.order: list[int] = []
        self.shared: list[MutableMapping[Any, Any]] = []
        self.hidden = torch.empty(0)

    def fake(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            by_name = HIDDEN in kwargs
            state = kwargs[HIDDEN] if by_name else args[0]
            self.order.append(index)
            args, rest = (args, kwargs) if by_name else (args[1:], kwargs)
            if len(self.order) == 1:
                self._begin(state, (*args, *rest.values()))
                self._see_what_it_returns(lambda: real(*args, **rest) if by_name else real(state, *args, **rest))
            reads = Reads.of(args, rest, self.shared, self.returned.output if len(self.order) > 1 else None)
            args, rest = reads.without(args, {**rest, HIDDEN: None} if by_name else rest)
            self.calls[index] = Call(self.interned.share(args), self.interned.share(rest), reads, self.form)
            if index == self.last:
                raise _Stop
            return self.returned.around(state)

        return forward

    def finished(self, blocks: int) -> list[Call]:
        """The calls of all blocks, each of which leaves what any of them reads."""
        kept = frozenset(number for call in self.calls.values() for number in call.reads.places.values())
        for call in self.calls.values():
            call.reads = replace(call.reads, kept=kept)
        return [self.calls.get(index, Skipped()) for index in range(blocks)]

    def _begin(self, state: Tensor, arguments: Sequence[Any]) -> None:
        self.hidden = self.form.plain(state)
        # Empty, and in the hands of the first block: blocks fill it for later ones.
        self.shared = [one for one in arguments if isinstance(one, MutableMapping) and not one]

    def _see_what_it_returns(self, run: Callable[[], Any]) -> None:
        """Run the first block: once, or for every batch where it returns tensors beside the states."""
        if self.returned.output is None or any(isinstance(x, Tensor) for x in _beside(self.returned.output)):
            self.returned = Returned(run(), self.form)
            for mapping in self.shared:
                mapping.clear()


def _beside(output: Any) -> Sequence[Any]:
    """What a block returned beside the states."""
    return output[1:] if isinstance(output, tuple | list) else ()


@contextmanager
def forwards_replaced(
    blocks: Iterable[nn.Module], fake: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """`fake(index, forward)` in the place of each block's forward, for as long as the context lasts."""
    try:
        for index, block in enumerate(blocks):
            block.forward = fake(index, type(block).forward.__get__(block))
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _Interned:
    """Keeps one copy of arguments that are equal from batch to batch (masks, rotary tables)."""

    def __init__(self) -> None:
        self.by_shape: dict[tuple[Any, ...], list[Tensor]] = {}

    def share(self, tree: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, self._one, tree)

    def _one(self, tensor: Tensor) -> Tensor:
        same = self.by_shape.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for twin in same:
            if twin is tensor or torch.equal(twin, tensor):
                return twin
        same.append(tensor)
        return tensor
