"""Walk a model block by block with the hidden states of the calibration windows in hand.

The arguments that a block gets besides its hidden states (masks, rotary embeddings, ...) are
captured from one real run of the model's own code and never rebuilt, so no model is known by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from eckart.errors import ModelError

Tensor = torch.Tensor
HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends the captured run before the head, whose cost would be wasted."""


@dataclass
class Call:
    """How the model called one block: its arguments, with the hidden states taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states, `[batch, seq, width]`."""
        if HIDDEN in self.kwargs:
            output = block(*self.args, **{**self.kwargs, HIDDEN: hidden})
        else:
            output = block(hidden, *self.args, **self.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


@dataclass
class Stream:
    """The hidden states of all windows before block `position`, batch by batch.

    `hidden[i]` is `[batch, seq, width]`; `calls[i][b]` is how the model calls block b on batch i.
    """

    batches: tuple[Tensor, ...]
    hidden: list[Tensor]
    calls: list[list[Call]]
    returns_tuple: bool
    position: int = 0

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    def inputs(self) -> Iterator[tuple[int, Tensor, Call]]:
        """`(batch index, hidden states, call)` for the block at `position`."""
        for index, hidden in enumerate(self.hidden):
            yield index, hidden, self.calls[index][self.position]


def split_batches(windows: Tensor, batch_tokens: int) -> tuple[Tensor, ...]:
    """Cut `[windows, length]` token ids into batches of about `batch_tokens` tokens."""
    return windows.split(max(1, batch_tokens // windows.shape[1]))


@torch.no_grad()
def open_stream(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor]
) -> Stream:
    """Run the model up to its first block on every batch and capture every block's call.

    Only the embeddings really run, and block 0 once, to see whether a block returns a tuple.
    """
    hidden, calls, seen = [], [], _Interned()
    returns_tuple = False
    for number, batch in enumerate(batches):
        captured: list[Call] = []
        entered: list[Tensor] = []

        def fake(index: int, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal returns_tuple
                state = kwargs[HIDDEN] if HIDDEN in kwargs else args[0]
                if index == 0:
                    entered.append(state)
                    if number == 0:
                        returns_tuple = isinstance(real(*args, **kwargs), tuple)
                rest = args if HIDDEN in kwargs else args[1:]
                kwargs = {**kwargs, HIDDEN: None} if HIDDEN in kwargs else kwargs
                captured.append(Call(seen.share(rest), seen.share(kwargs)))
                if index == len(blocks) - 1:
                    raise _Stop
                return (state,) if returns_tuple else state

            return forward

        with _forwards_replaced(blocks, fake):
            try:
                model(input_ids=batch, use_cache=False)
            except _Stop:
                pass
        if len(captured) != len(blocks):
            raise ModelError(
                f"{type(model).__name__}: called {len(captured)} of its {len(blocks)} blocks in one run; "
                "eckart needs every block to run once, in order."
            )
        hidden.append(entered[0])
        calls.append(captured)
    return Stream(tuple(batches), hidden, calls, returns_tuple)


def run_tail(model: nn.Module, blocks: nn.ModuleList, stream: Stream, index: int, **kwargs: Any) -> Any:
    """Run what follows the last block on batch `index`: final norm, head, and the loss for `labels`.

    The stream must have passed every block; none of them runs again. Gradients flow to
    `stream.hidden[index]` if it asks for them.
    """

    def fake(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **block_kwargs: Any) -> Any:
            state = block_kwargs[HIDDEN] if HIDDEN in block_kwargs else args[0]
            result = stream.hidden[index] if number == len(blocks) - 1 else state
            return (result,) if stream.returns_tuple else result

        return forward

    assert stream.position == len(blocks)
    with _forwards_replaced(blocks, fake):
        return model(input_ids=stream.batches[index], use_cache=False, **kwargs)


@contextmanager
def _forwards_replaced(
    blocks: nn.ModuleList, fake: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    try:
        for index, block in enumerate(blocks):
            block.forward = fake(index, type(block).forward.__get__(block))  # type: ignore[method-assign]
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
        for known in same:
            if known is tensor or torch.equal(known, tensor):
                return known
        same.append(tensor)
        return tensor
