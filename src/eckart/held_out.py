"""How far the model is from the dense one, as it is at the moment, on a few windows of text."""

from collections.abc import Sequence

import torch
from torch import nn

from eckart.data import Windows
from eckart.divergence import log_probabilities, mean_kl

Tensor = torch.Tensor

WINDOWS, LENGTH = 8, 256  # the dense log-probabilities stay in memory: 2048 x vocabulary x 4 bytes


class HeldOut:
    """Remembers what the dense model predicts on `windows`, each `[length]`; `kl()` compares the model of now.

    `unseen` says that nothing was calibrated on these windows.
    """

    def __init__(self, model: nn.Module, windows: Sequence[Tensor], unseen: bool) -> None:
        self.model, self.windows, self.unseen = model, windows, unseen
        self.dense = [log_probabilities(model, window) for window in windows]

    @staticmethod
    def of(model: nn.Module, windows: Windows) -> "HeldOut":
        """On the spare windows of a calibration; on its last ones where the text had no more."""
        unseen = len(windows.spare) > 0
        chosen = (windows.spare if unseen else windows.ids[-WINDOWS:])[:WINDOWS, :LENGTH]
        return HeldOut(model, list(chosen), unseen)

    def kl(self) -> float:
        """KL(dense || model) in nats per token; raises `NumericalError` when it is not finite."""
        return mean_kl(self.model, self.windows, self.dense)

    def to_dict(self) -> dict[str, int | bool]:
        return {"windows": len(self.windows), "length": len(self.windows[0]), "unseen": self.unseen}
