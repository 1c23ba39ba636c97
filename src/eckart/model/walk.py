"""Walk through a model block by block, with the hidden states of any number of streams in hand.

    stream = open_stream(model, residence, batches)
    for at in walk(residence, stream):
        ...                                # block `at.index` is at hand; what the caller does not move, the walk does

This is the one loop over blocks. It asks the residence for each block, so that callers need not know where the
weights are. A stream holds the states that enter its next block; streams with other states of the same batches
(what a compressed model has there, what a candidate plan has) walk side by side.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import EckartError, ModelError
from eckart.model.calls import Call, Returned, capture, forwards_replaced
from eckart.model.carried import Carried
from eckart.model.residence import Residence
from eckart.model.store import Store
from eckart.portable.linear import swap_
from eckart.progress import Progress, silent, track

BATCH_TOKENS = 2048  # in a batch: enough for products at full speed, few enough to keep activations small
PROOF = 128  # tokens that a walk proves itself on: logits of many would be the largest tensors of a small run
TOLERANCE = 1e-3  # of the largest logit: what rounding may change when products run in another order


@dataclass
class Stream:
    """The hidden states of some windows before block `position`, batch by batch.

    `batches[i]` is `[batch, seq]` token ids, `states[i]` `[batch, seq, width]`; `calls[i][b]` is how the model calls
    block b on batch i, and `carried[i]` what block `position` finds beside the states.
    """

    batches: tuple[Tensor, ...]
    states: Store
    calls: list[list[Call]]
    returned: Returned
    carried: list[Carried]
    position: int = 0

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.batches)

    def branch(self, states: Sequence[Tensor] | Store | None = None, position: int | None = None) -> "Stream":
        """Another stream of the same batches, from here or from other states; each goes its own way."""
        store = self.states.copy() if states is None else Store(states)
        position = self.position if position is None else position
        return replace(self, states=store, carried=list(self.carried), position=position)

    def native(self, batch: int) -> Tensor:
        """The states of one batch as the model itself arranges them."""
        return self.returned.form.native(self.states[batch])


@dataclass(frozen=True)
class At:
    """Where a walk is: `block` is number `index`, with its weights at hand."""

    index: int
    block: nn.Module

    def run(self, stream: Stream, batch: int, state: Tensor | None = None, block: Any = None) -> Tensor:
        """The block's output `[batch, seq, width]` for one batch of a stream; the stream stays where it is.

        `state` replaces the stream's own; `block` stands in for the block.
        """
        return self._step(stream, batch, state, block)[0]

    def outputs(self, stream: Stream, states: Sequence[Tensor] | Store | None = None) -> list[Tensor]:
        """The block's outputs for all batches of a stream, or for other states of them."""
        entering = stream.states if states is None else states
        return [self.run(stream, batch, state) for batch, state in enumerate(entering)]

    def steps(self, stream: Stream) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Move a stream past the block: `(batch, what entered, what left)`, one batch after the other."""
        for batch, entering in enumerate(stream.states):
            leaving, stream.carried[batch] = self._step(stream, batch)
            stream.states[batch] = leaving
            yield batch, entering, leaving
        stream.position = self.index + 1

    def _step(
        self, stream: Stream, batch: int, state: Tensor | None = None, block: Any = None
    ) -> tuple[Tensor, Carried]:
        entering = stream.states[batch] if state is None else state
        return stream.calls[batch][self.index].run(block or self.block, entering, stream.carried[batch])

    def advance(self, stream: Stream) -> None:
        """Move a stream past the block."""
        for _ in self.steps(stream):
            pass


def walk(
    residence: Residence,
    *streams: Stream,
    first: int = 0,
    backward: bool = False,
    stage: str = "",
    progress: Progress = silent,
) -> Iterator[At]:
    """Yield one block after another, from `first` on, or from the last to the first.

    In a forward walk, every stream that is still before the block when the caller asks for the next one is moved past
    it. `stage` is the name that `progress` gets. Gradients flow if the caller has enabled them.
    """
    order = range(len(residence) - 1, first - 1, -1) if backward else range(first, len(residence))
    for index in track(order, stage, len(order), progress if stage else silent):
        with residence.block(index) as block:
            at = At(index, block)
            yield at
            for stream in () if backward else streams:
                if stream.position == index:
                    at.advance(stream)


def pass_blocks(residence: Residence, stream: Stream, stage: str = "", progress: Progress = silent) -> Stream:
    """Move a stream past all blocks that are before it, and return it."""
    for _ in walk(residence, stream, first=stream.position, stage=stage, progress=progress):
        pass
    return stream


def split_batches(windows: Tensor, batch_tokens: int = BATCH_TOKENS) -> tuple[Tensor, ...]:
    """Cut `[windows, length]` token ids into batches of about `batch_tokens` tokens."""
    return torch.split(windows, max(1, batch_tokens // windows.shape[1]))


@torch.no_grad()
def open_stream(model: nn.Module, residence: Residence, batches: Sequence[Tensor]) -> Stream:
    """The states of every batch `[batch, seq]` before the first block, and how the model calls each block."""
    with residence.block(0):
        captured = capture(model, residence.structure, batches)
    return Stream(tuple(batches), Store(captured.hidden), captured.calls, captured.returned, captured.carried)


def run_tail(
    model: nn.Module, residence: Residence, stream: Stream, batch: int, part: tuple[slice, slice] | None = None
) -> Any:
    """Run what follows the last block on one batch: final norm and head.

    The stream must have passed every block; none of them runs again. `part` takes some of the batch's windows and
    positions. Gradients flow to `stream.states[batch]` if it asks for them.
    """
    assert stream.position == len(residence)
    ids, state = stream.batches[batch], stream.states[batch]
    if part is not None:
        ids, state = ids[part], state[part]
    return tail_of(model, residence, ids, state, stream.returned)


def tail_of(model: nn.Module, residence: Residence, ids: Tensor, state: Tensor, returned: Returned) -> Any:
    """What the model makes of the states `[batch, seq, width]` that leave its last block, for these token ids."""
    native = returned.form.native(state)

    def fake(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: returned.around(native)  # whichever block is the last one that runs

    with forwards_replaced(residence.structure, fake):
        return model(input_ids=ids, use_cache=False)


@torch.no_grad()
def prove(model: nn.Module, residence: Residence, ids: Tensor) -> None:
    """Walk the beginning of one window `[length]` of token ids and compare with a plain forward pass of the model.

    Everything that is collected, measured and refined rests on the walk giving the model's own states. Raises
    `ModelError` that names the model where it does not: one that runs a block more than once, carries more than hidden
    states from block to block, or has its blocks somewhere else than where they were found.
    """
    ids = ids[None, :PROOF].to(residence.device)
    with _told(model, "does not run on token ids alone"):
        expected = _answer(model(input_ids=ids, use_cache=False))
    with _told(model, "does not run block by block, so eckart cannot compress this model"):
        stream = pass_blocks(residence, open_stream(model, residence, [ids]))
        actual = _answer(run_tail(model, residence, stream, 0))
    gap, scale = (actual - expected).float().abs().max(), expected.float().abs().max()
    if not gap <= TOLERANCE * scale.clamp(min=1e-30) and torch.isfinite(scale):
        raise ModelError(
            f"{type(model).__name__}: run block by block, its predictions differ from its own (by {gap / scale:.1e} of "
            f"the largest); the blocks in {residence.name!r} are not run one after the other, once each, so eckart "
            "cannot compress this model."
        )


@contextmanager
def _told(model: nn.Module, what: str) -> Iterator[None]:
    """Turn what code of a model raises into a `ModelError` of one line; a lack of memory is no word on the model."""
    try:
        yield
    except (EckartError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise ModelError(f"{type(model).__name__}: {what}: {reason}") from None


def _answer(output: Any) -> Tensor:
    """What a model says in the end: logits, or the states of a model without a head."""
    answer: Tensor = output.logits if getattr(output, "logits", None) is not None else output[0]
    return answer


def predicts_tokens(model: nn.Module) -> bool:
    """True for a model that gives logits of a next token, which losses are measured by; not so embedders and judges."""
    generates = getattr(model, "can_generate", None)
    return bool(generates()) if callable(generates) else True


@contextmanager
def replaced(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """These layers in the places of the submodules of their names, for as long as the context lasts."""
    before: dict[str, nn.Module] = {}
    try:
        for name, layer in layers.items():
            before[name] = swap_(model, name, layer)
        yield
    finally:
        for name, layer in before.items():
            swap_(model, name, layer)
