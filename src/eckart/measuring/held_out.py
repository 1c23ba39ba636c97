"""How far the model, in its present state, is from the dense one, on a few windows of text."""

import torch
from torch import Tensor, nn

from eckart.measuring.divergence import Divergence
from eckart.model.discovery import Layout
from eckart.model.residence import residence_of
from eckart.model.store import Store
from eckart.model.walk import Stream, open_stream, pass_blocks, split_batches
from eckart.text.data import Windows

WINDOWS, LENGTH = 8, 256


class HeldOut:
    """Remembers what the dense model predicts on `windows` `[windows, length]`; `kl()` compares the model as it is.

    What is remembered are hidden states: predictions would be tokens x vocabulary numbers. `unseen` says that
    nothing was calibrated on these windows.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, layout: Layout, windows: Tensor, unseen: bool) -> None:
        self.windows, self.length, self.unseen = len(windows), windows.shape[1], unseen
        self.residence = residence_of(model, layout)
        ids = windows[:, :-1].to(self.residence.device)  # nothing follows the last token
        self._start = open_stream(model, self.residence, split_batches(ids))
        self.divergence = Divergence(model, self.residence, pass_blocks(self.residence, self.stream()))

    @staticmethod
    def of(model: nn.Module, layout: Layout, windows: Windows) -> "HeldOut":
        """On the unseen windows of a calibration; on its last ones where the text had no more."""
        unseen = len(windows.unseen) > 0
        chosen = (windows.unseen if unseen else windows.ids[-WINDOWS:])[:WINDOWS, :LENGTH]
        return HeldOut(model, layout, chosen, unseen)

    def stream(self) -> Stream:
        """A new stream of the windows before the first block."""
        return self._start.branch()

    @torch.no_grad()
    def kl(self) -> float:
        """KL(dense || model) in nats per token; raises `NumericalError` when it is not finite."""
        return self.kl_of(pass_blocks(self.residence, self.stream()).states)

    def kl_of(self, finals: Store) -> float:
        """The same from the states that leave the last block."""
        return self.divergence(finals)

    def to_dict(self) -> dict[str, int | bool]:
        return {"windows": self.windows, "length": self.length, "unseen": self.unseen}
