"""How far the model is from the dense one, as it is at the moment, on a few windows of text."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from eckart.blocks import final_states, open_stream, split_batches
from eckart.data import Windows
from eckart.discovery import Layout
from eckart.tail_divergence import TailDivergence

Tensor = torch.Tensor

WINDOWS, LENGTH = 8, 256
BATCH_TOKENS = 2048


class HeldOut:
    """Remembers what the dense model predicts on `windows` `[windows, length]`; `kl()` compares the model of now.

    What is remembered are hidden states: predictions would be tokens x vocabulary numbers. `unseen` says that
    nothing was calibrated on these windows.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, layout: Layout, windows: Tensor, unseen: bool) -> None:
        self.windows, self.length, self.unseen = len(windows), windows.shape[1], unseen
        self.blocks = layout.block_list(model)
        ids = windows[:, :-1].to(next(model.parameters()).device)  # nothing follows the last token
        self.stream = open_stream(model, self.blocks, split_batches(ids, BATCH_TOKENS))
        self.divergence = TailDivergence(model, self.blocks, self.stream, final_states(self.blocks, self.stream))

    @staticmethod
    def of(model: nn.Module, layout: Layout, windows: Windows) -> "HeldOut":
        """On the spare windows of a calibration; on its last ones where the text had no more."""
        unseen = len(windows.spare) > 0
        chosen = (windows.spare if unseen else windows.ids[-WINDOWS:])[:WINDOWS, :LENGTH]
        return HeldOut(model, layout, chosen, unseen)

    @torch.no_grad()
    def kl(self, first: int = 0, entering: Sequence[Tensor] | None = None) -> float:
        """KL(dense || model) in nats per token; raises `NumericalError` when it is not finite.

        Runs the blocks from `first` on, on what enters that one: `entering_blocks()[first]` of a model whose blocks
        before `first` are those of now.
        """
        stream = self.stream if entering is None else replace(self.stream, hidden=list(entering), position=first)
        return self.divergence(final_states(self.blocks, stream)) / (self.length - 1)

    @torch.no_grad()
    def entering_blocks(self) -> list[list[Tensor]]:
        """What enters each block of the model as it is now: `[block][batch]` is `[batch, seq, width]`."""
        stream = replace(self.stream, hidden=list(self.stream.hidden))
        entering = []
        for stream.position, block in enumerate(self.blocks):
            entering.append(list(stream.hidden))
            stream.hidden = [call.run(block, hidden) for _, hidden, call in stream.inputs()]
        return entering

    def to_dict(self) -> dict[str, int | bool]:
        return {"windows": self.windows, "length": self.length, "unseen": self.unseen}
