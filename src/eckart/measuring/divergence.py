"""KL divergence of a model's predictions from the dense model's, in nats per token, from what leaves the last block.

Where the tail of the model ends in a plain linear head, `eckart.maths.divergence` reads it off the
head's inputs. Any other tail (capped or scaled logits) is run for both, a chunk of tokens at a time.
A trial decides which of the two it is: the output of a plain head leaves the model unchanged.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.maths import divergence as maths
from eckart.maths.divergence import Head
from eckart.model.residence import Residence
from eckart.model.store import Store
from eckart.model.walk import Stream, tail_of
from eckart.portable.linear import is_linear, weight_view

CHUNK_ELEMENTS = 2**23  # of one chunk's log-probabilities: 32 MiB in float32


class Divergence:
    """The dense model's predictions on the batches of a stream, to compare others with.

    `dense` has passed the blocks of the dense model. The tail (final norm, head) treats each position on its own, so
    any part of them may be run.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, residence: Residence, dense: Stream) -> None:
        assert dense.position == len(residence)
        self.model, self.residence = model, residence
        self.batches, self.returned, self.finals = dense.batches, dense.returned, dense.states.copy()
        self.head = self._plain_head()
        self.references: list[maths.Reference] = []
        if self.head is not None:
            for index, hidden in enumerate(self.finals):
                self.references.append(maths.reference(self.head, self._entrance(index, hidden)))

    @torch.no_grad()
    def __call__(self, candidate: Store) -> float:
        """`KL(dense || candidate)` in nats per token, from the states that leave the candidate's last block.

        Raises `NumericalError` when it is not finite.
        """
        total = 0.0
        for index, hidden in enumerate(candidate):
            if self.head is None:
                total += self._by_chunks(index, hidden)
            else:
                state = self._entrance(index, hidden)
                total += float(maths.divergence(self.head, self.references[index], state).sum())
        if not isfinite(total):
            raise NumericalError("the KL divergence from the dense model is NaN or infinite; compute in float32.")
        return total / sum(batch.numel() for batch in self.batches)

    def _plain_head(self) -> Head | None:
        """The head, if it is linear and the model gives its output back as it is."""
        module = self.model.get_output_embeddings()  # type: ignore[operator]
        if module is None or not is_linear(module):
            return None
        weight = weight_view(module)
        mark = torch.linspace(-300, 300, len(weight), device=weight.device, dtype=weight.dtype)  # beyond any cap
        first = self.finals[0][:, :1]
        with _forward_replaced(module, lambda hidden: mark.expand(*hidden.shape[:-1], -1)):
            logits = self._logits(0, slice(0, 1), first)
        plain = logits.shape[-1] == len(mark) and torch.equal(logits, mark.expand_as(logits).to(logits.dtype))
        return Head(weight, module.bias) if plain else None

    def _entrance(self, index: int, hidden: Tensor) -> Tensor:
        """What enters the head, `[tokens of the batch, width]`."""
        with _forward_replaced(self.model.get_output_embeddings(), lambda state: state):  # type: ignore[operator]
            return self._logits(index, slice(None), hidden).flatten(0, 1)

    def _logits(self, index: int, part: slice, hidden: Tensor) -> Tensor:
        """Of batch `index` at some positions, whose states after the last block are `hidden`."""
        ids = self.batches[index][:, part]
        logits: Tensor = tail_of(self.model, self.residence, ids, hidden, self.returned).logits
        return logits

    def _by_chunks(self, index: int, hidden: Tensor) -> float:
        """Summed over a batch for any tail, for as many positions at a time as `CHUNK_ELEMENTS` has room for."""
        rows, length = self.batches[index].shape
        vocabulary = self._logits(index, slice(0, 1), hidden[:, :1]).shape[-1]
        step = max(1, CHUNK_ELEMENTS // (vocabulary * rows))
        total = 0.0
        for start in range(0, length, step):
            part = slice(start, start + step)
            expected = self._logits(index, part, self.finals[index][:, part]).float().log_softmax(-1)
            candidate = self._logits(index, part, hidden[:, part]).float().log_softmax(-1)
            total += float(maths.from_log_probabilities(expected, candidate).double().sum())
        return total


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward")
