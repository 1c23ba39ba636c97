"""KL divergence of a model's predictions from the dense model's, from hidden states after the last block.

Where the tail of the model ends in a plain linear head, `eckart.head_divergence` reads it off the
head's inputs. Any other tail (capped or scaled logits) is run for both, a chunk of tokens at a time.
Which it is, is tried and not looked up: a plain head's output comes out of the model untouched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
from torch import nn

from eckart import head_divergence
from eckart.blocks import Stream, run_tail
from eckart.errors import NumericalError
from eckart.head_divergence import Head
from eckart.linear import is_linear, weight_view

Tensor = torch.Tensor

CHUNK_ELEMENTS = 2**23  # of one chunk's log-probabilities: 32 MiB in float32


class TailDivergence:
    """The dense model's predictions on the batches of a stream, to compare others with.

    `finals` are its hidden states after the last block, `[batch, seq, width]`, one for each batch of
    `stream`. The tail (final norm, head) treats each position on its own, so any part of them may be run.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, blocks: nn.ModuleList, stream: Stream, finals: Sequence[Tensor]) -> None:
        self.model, self.blocks, self.finals = model, blocks, finals
        self.batches, self.returns_tuple = stream.batches, stream.returns_tuple
        self.head = self._plain_head()
        self.references: list[head_divergence.Reference] = []
        if self.head is not None:
            for index, hidden in enumerate(finals):
                self.references.append(head_divergence.reference(self.head, self._entrance(index, hidden)))

    @torch.no_grad()
    def __call__(self, candidate: Sequence[Tensor]) -> float:
        """`KL(dense || candidate)` in nats, summed over a window, averaged over windows, from the final states.

        Raises `NumericalError` when it is not finite.
        """
        total = 0.0
        for index, hidden in enumerate(candidate):
            if self.head is None:
                total += self._by_chunks(index, hidden)
            else:
                state = self._entrance(index, hidden)
                total += float(head_divergence.divergence(self.head, self.references[index], state).sum())
        if not isfinite(total):
            raise NumericalError("the KL divergence from the dense model is NaN or infinite; compute in float32.")
        return total / sum(len(batch) for batch in self.batches)

    def _plain_head(self) -> Head | None:
        """The head, if it is linear and the model gives its output back as it is."""
        module = self.model.get_output_embeddings()  # type: ignore[operator]
        if module is None or not is_linear(module):
            return None
        weight = weight_view(module)
        mark = torch.linspace(-300, 300, len(weight), device=weight.device, dtype=weight.dtype)  # beyond any cap
        first = self.finals[0][:, :1]
        with _forward_replaced(module, lambda hidden: mark.expand(*hidden.shape[:-1], -1)):
            found = self._logits(0, slice(0, 1), first)
        plain = found.shape[-1] == len(mark) and torch.equal(found, mark.expand_as(found).to(found.dtype))
        return Head(weight, module.bias) if plain else None

    def _entrance(self, index: int, hidden: Tensor) -> Tensor:
        """What enters the head, `[tokens of the batch, width]`."""
        with _forward_replaced(self.model.get_output_embeddings(), lambda state: state):  # type: ignore[operator]
            return self._logits(index, slice(None), hidden).flatten(0, 1)

    def _logits(self, index: int, part: slice, hidden: Tensor) -> Tensor:
        """Of batch `index` at some positions, whose hidden states after the last block are `hidden`."""
        ids = self.batches[index][:, part]
        piece = Stream((ids,), [hidden], [], self.returns_tuple, position=len(self.blocks))
        logits: Tensor = run_tail(self.model, self.blocks, piece, 0).logits
        return logits

    def _by_chunks(self, index: int, hidden: Tensor) -> float:
        """For any tail: both log-probabilities, for as many positions at a time as `CHUNK_ELEMENTS` has room for."""
        rows, length = self.batches[index].shape
        vocabulary = self._logits(index, slice(0, 1), hidden[:, :1]).shape[-1]
        step = max(1, CHUNK_ELEMENTS // (vocabulary * rows))
        total = 0.0
        for start in range(0, length, step):
            part = slice(start, start + step)
            expected = self._logits(index, part, self.finals[index][:, part]).float().log_softmax(-1)
            found = self._logits(index, part, hidden[:, part]).float().log_softmax(-1)
            # The difference first, so that nothing cancels; in place, since these tensors are the largest here.
            total -= float(found.sub_(expected).mul_(expected.exp_()).sum(-1).double().sum())
        return total


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward")
