"""How a model calls its blocks: captured from one real run of the model's own code, and never rebuilt.

Besides hidden states a block gets masks, rotary embeddings and more. Because these arguments are captured, nothing
here depends on the kind of model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from eckart.errors import ModelError

HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends the captured run before the head, whose cost would be wasted."""


@dataclass
class Call:
    """How the model called one block: its arguments, with the hidden states taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The output hidden states, `[batch, seq, width]`, of the block or of what stands in for it."""
        if HIDDEN in self.kwargs:
            output = block(*self.args, **{**self.kwargs, HIDDEN: hidden})
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return states_of(output)


def states_of(output: Any) -> Tensor:
    """The hidden states `[batch, seq, width]` of what a block returned: itself, or the first of several things."""
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


@dataclass(frozen=True)
class Returned:
    """The form in which blocks return hidden states, taken from block 0: `around(states)` gives other states that form.

    What else a block returns (biases of attention, caches) is handed on as block 0 gave it. A model that carries more
    than hidden states from block to block cannot be walked; `eckart.model.walk.prove` finds that out.
    """

    output: Any = None

    def around(self, states: Tensor) -> Any:
        if isinstance(self.output, tuple) and hasattr(self.output, "_fields"):
            return type(self.output)(states, *self.output[1:])
        if isinstance(self.output, tuple | list):
            return type(self.output)([states, *self.output[1:]])
        return states


@dataclass
class Captured:
    """What was captured from one run of the model.

    `hidden[i]` `[batch, seq, width]` enters block 0 of batch i, which calls block b by `calls[i][b]`; `returned` is
    what a block returns.
    """

    hidden: list[Tensor]
    calls: list[list[Call]]
    returned: Returned


@torch.no_grad()
def capture(model: nn.Module, blocks: Iterable[nn.Module], batches: Sequence[Tensor]) -> Captured:
    """Run the model up to its first block on every batch, `[batch, length]` token ids, and capture every block's call.

    Only the embeddings really run, and block 0 once, to see what a block returns. Raises `ModelError` for
    a model that does not run every block once.
    """
    captured = Captured([], [], Returned())
    interned, blocks = _Interned(), list(blocks)
    for batch in batches:
        stand_in = _Capture(captured, interned, last=len(blocks) - 1)
        with forwards_replaced(blocks, stand_in.fake), suppress(_Stop):
            model(input_ids=batch, use_cache=False)
        if len(stand_in.calls) != len(blocks):
            raise ModelError(
                f"{type(model).__name__}: called {len(stand_in.calls)} of its {len(blocks)} blocks in one run; "
                "eckart needs every block to run once, in order."
            )
        captured.calls.append(stand_in.calls)
    return captured


class _Capture:
    """Stands in for the blocks during one batch's run: keeps each call and passes the hidden states on."""

    def __init__(self, captured: Captured, interned: "_Interned", last: int) -> None:
        self.captured, self.interned, self.last = captured, interned, last
        self.calls: list[Call] = []

    def fake(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            by_name = HIDDEN in kwargs
            state = kwargs[HIDDEN] if by_name else args[0]
            if index == 0:
                if not self.captured.hidden:
                    self.captured.returned = Returned(real(*args, **kwargs))
                self.captured.hidden.append(state)
            args, kwargs = (args, {**kwargs, HIDDEN: None}) if by_name else (args[1:], kwargs)
            self.calls.append(Call(self.interned.share(args), self.interned.share(kwargs)))
            if index == self.last:
                raise _Stop
            return self.captured.returned.around(state)

        return forward


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
