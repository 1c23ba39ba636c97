"""Two streams of hidden states, dense and compressed, that pass a half-compressed model block by block.

The compressed stream is what the next block will really be fed; the dense one is what it should have
been fed. Unlike `sweep`, which only listens, this is the ground for methods that change a block and
then move on: nothing here grows with depth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from eckart.blocks import Call, open_stream
from eckart.linear import swap_
from eckart.recorder import Recorder
from eckart.statistics import Gram
from eckart.types import Target

Tensor = torch.Tensor
Goal = Literal["anchored", "same_input"]


@dataclass
class TwoStreams:
    """`dense[i]` and `compressed[i]` `[batch, seq, width]` enter block `position`; `calls[i]` is how it is called."""

    dense: list[Tensor]
    compressed: list[Tensor]
    calls: list[list[Call]]
    position: int = 0

    @staticmethod
    def open(model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor]) -> "TwoStreams":
        """Both streams before the first block, where they are the same. `batches[i]` is `[batch, length]` token ids."""
        stream = open_stream(model, blocks, batches)
        return TwoStreams(list(stream.hidden), list(stream.hidden), stream.calls)

    def run(self, block: Callable[..., Any], hidden: Tensor, index: int) -> Tensor:
        """The output `[batch, seq, width]` of the block at `position` (or its stand-in) for batch `index`."""
        return self.calls[index][self.position].run(block, hidden)

    @torch.no_grad()
    def outputs(self, block: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.run(block, hidden, index) for index, hidden in enumerate(inputs)]

    def goals(
        self, block: nn.Module, dense: Mapping[str, Tensor], targets: Sequence[Target], goal: Goal
    ) -> list[Tensor]:
        """What the compressed block shall give, batch by batch.

        `anchored` is the dense block on dense inputs, so that inherited error is to be undone; it moves the
        dense stream past the block. `same_input` is the dense block on the compressed inputs.
        """
        with dense_again(block, targets, dense):
            if goal == "same_input":
                return self.outputs(block, self.compressed)
            self.dense = self.outputs(block, self.dense)
            return self.dense

    def advance(self, block: nn.Module) -> None:
        """Move the compressed stream past the block as it now is, and both to the next one."""
        self.compressed = self.outputs(block, self.compressed)
        self.position += 1


@contextmanager
def dense_again(block: nn.Module, targets: Sequence[Target], dense: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the dense weights `{target name: [out, in]}` back into a block for a while; biases are the same objects."""
    swapped = []
    try:
        for target in targets:
            if target.name in dense:
                bias = block.get_submodule(target.kind).bias
                linear = nn.Linear(target.in_features, target.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(dense[target.name], requires_grad=False)
                linear.bias = bias  # type: ignore[assignment]
                swapped.append((target.kind, swap_(block, target.kind, linear)))
        yield
    finally:
        for kind, module in swapped:
            swap_(block, kind, module)


@torch.no_grad()
def stages(streams: TwoStreams, block: nn.Module, targets: Sequence[Target]) -> list[list[Target]]:
    """The targets in the order in which the block runs them; those that read the same tensor are one stage."""
    with Recorder(block, targets) as recorder:
        streams.run(block, streams.compressed[0], 0)
        return [[target for target, _ in members] for _, members in recorder.by_input()]


@torch.no_grad()
def input_gram(streams: TwoStreams, block: nn.Module, target: Target, batches: Sequence[int]) -> Gram:
    """The Gram of what the target reads in the compressed stream, over the batches with these numbers."""
    gram = Gram(target.in_features, streams.compressed[0].device)
    with Recorder(block, [target]) as recorder:
        for index in batches:
            streams.run(block, streams.compressed[index], index)
            for x, _ in recorder.by_input():
                gram.add_(x)
    return gram
