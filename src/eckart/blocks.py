"""Walk a model block by block with the hidden states of the calibration windows in hand.

The arguments that a block gets besides its hidden states (masks, rotary embeddings, ...) are
captured from one real run of the model's own code and never rebuilt, so no model is known by name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The output hidden states, `[batch, seq, width]`, of the block or of what stands in for it."""
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
    return torch.split(windows, max(1, batch_tokens // windows.shape[1]))


@torch.no_grad()
def open_stream(model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor]) -> Stream:
    """Run the model up to its first block on every batch and capture every block's call.

    Only the embeddings really run, and block 0 once, to see whether a block returns a tuple.
    """
    stream = Stream(tuple(batches), [], [], returns_tuple=False)
    seen = _Interned()
    for batch in batches:
        capture = _Capture(stream, seen, last=len(blocks) - 1)
        with _forwards_replaced(blocks, capture.fake), suppress(_Stop):
            model(input_ids=batch, use_cache=False)
        if len(capture.calls) != len(blocks):
            raise ModelError(
                f"{type(model).__name__}: called {len(capture.calls)} of its {len(blocks)} blocks in one run; "
                "eckart needs every block to run once, in order."
            )
        stream.calls.append(capture.calls)
    return stream


class _Capture:
    """Stands in for the blocks during one batch's run: keeps each call and passes the hidden states on."""

    def __init__(self, stream: Stream, seen: "_Interned", last: int) -> None:
        self.stream, self.seen, self.last = stream, seen, last
        self.calls: list[Call] = []

    def fake(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            by_name = HIDDEN in kwargs
            state = kwargs[HIDDEN] if by_name else args[0]
            if index == 0:
                if not self.stream.hidden:
                    self.stream.returns_tuple = isinstance(real(*args, **kwargs), tuple)
                self.stream.hidden.append(state)
            args, kwargs = (args, {**kwargs, HIDDEN: None}) if by_name else (args[1:], kwargs)
            self.calls.append(Call(self.seen.share(args), self.seen.share(kwargs)))
            if index == self.last:
                raise _Stop
            return (state,) if self.stream.returns_tuple else state

        return forward


def final_states(blocks: nn.ModuleList, stream: Stream) -> list[Tensor]:
    """Hidden states after the last block, batch by batch, from those where the stream stands; it stays there."""
    finals = list(stream.hidden)
    for batch, calls in enumerate(stream.calls):
        for index in range(stream.position, len(blocks)):
            finals[batch] = calls[index].run(blocks[index], finals[batch])
    return finals


def run_tail(model: nn.Module, blocks: nn.ModuleList, stream: Stream, index: int) -> Any:
    """Run what follows the last block on batch `index`: final norm and head.

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
        return model(input_ids=stream.batches[index], use_cache=False)


@contextmanager
def _forwards_replaced(
    blocks: nn.ModuleList, fake: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
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
        for known in same:
            if known is tensor or torch.equal(known, tensor):
                return known
        same.append(tensor)
        return tensor
