"""Two streams of hidden states, dense and compressed, that pass a half-compressed model block by block.

The compressed stream is what the next block will really read; the dense one is what it should read. Unlike `sweep`,
which only collects, this is for methods that change a block and then move on. Memory does not grow with depth.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eckart.model.operators import dense_again
from eckart.model.recorder import Recorder
from eckart.model.residence import residence_of
from eckart.model.walk import At, Stream, open_stream, walk
from eckart.refiners.base import Refinement
from eckart.statistics.sums import Gram
from eckart.types import Target

Aim = Literal["anchored", "same_input"]


@dataclass(frozen=True)
class AtBlock:
    """Where the two streams are: before block `index`, whose `targets` are factorised or were left dense."""

    at: At
    dense: Stream
    compressed: Stream
    targets: list[Target]

    @property
    def index(self) -> int:
        return self.at.index

    @property
    def block(self) -> torch.nn.Module:
        return self.at.block

    def aims(self, dense_weights: Mapping[str, Tensor], aim: Aim) -> list[Tensor]:
        """What the compressed block should give, batch by batch.

        `anchored` is the dense block on dense inputs, so that inherited error is to be undone; it moves the
        dense stream past the block. `same_input` is the dense block on the compressed inputs.
        """
        with torch.no_grad(), dense_again(self.block, dense_weights, self.targets):
            if aim == "same_input":
                return self.at.outputs(self.compressed)
            self.at.advance(self.dense)
            return list(self.dense.states)

    def run(self, batch: int, block: object = None) -> Tensor:
        """The output `[batch, seq, width]` of the block, or of what stands in for it, in the compressed stream."""
        return self.at.run(self.compressed, batch, block=block)

    @torch.no_grad()
    def stages(self) -> list[list[Target]]:
        """The targets in the order in which the block runs them; those that read the same tensor are one stage.

        So are the experts of one kind, also those that the first batch does not reach.
        """
        stages: dict[object, list[Target]] = {}
        with Recorder(self.block, self.targets) as recorder:
            self.run(0)
            for number, (_, members) in enumerate(recorder.by_input()):
                first = members[0][0]
                if first.expert is None:
                    stages[number] = [target for target, _ in members]
                else:
                    stages[first.kind] = [t for t in self.targets if t.kind == first.kind and t.expert is not None]
        return list(stages.values())

    @torch.no_grad()
    def input_grams(self, stage: Sequence[Target], batches: Sequence[int]) -> dict[str, Gram]:
        """The Grams of what the targets of a stage read, by their places in the block, from one run of the batches."""
        if stage[0].expert is None:
            return dict.fromkeys([target.place for target in stage], self.input_gram(stage[0], batches))
        device = self.compressed.states[0].device
        grams = {target.place: Gram(target.in_features, device) for target in stage}
        with Recorder(self.block, stage) as recorder:
            for batch in batches:
                self.run(batch)
                for x, members in recorder.by_input():
                    grams[members[0][0].place].add_(x)
        return grams

    @torch.no_grad()
    def input_gram(self, target: Target, batches: Sequence[int]) -> Gram:
        """The Gram of what the target reads in the compressed stream, over the batches with these numbers."""
        gram = Gram(target.in_features, self.compressed.states[0].device)
        with Recorder(self.block, [target]) as recorder:
            for batch in batches:
                self.run(batch)
                for x, _ in recorder.by_input():
                    gram.add_(x)
        return gram


def two_streams(refinement: Refinement, batches: Sequence[Tensor], stage: str = "") -> Iterator[AtBlock]:
    """Yield one block after another, both streams before it; then the compressed one is moved past the changed block.

    `batches[i]` is `[batch, length]` token ids. Before the first block both streams are the same. The dense
    stream is moved by `AtBlock.aims` alone.
    """
    residence = residence_of(refinement.model, refinement.layout)
    compressed = open_stream(refinement.model, residence, batches)
    dense = compressed.branch()
    for at in walk(residence, stage=stage, progress=refinement.progress):
        yield AtBlock(at, dense, compressed, refinement.layout.in_block(at.index))
        with torch.no_grad():
            at.advance(compressed)
