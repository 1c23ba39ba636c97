"""Perplexity of a model on windows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.errors import NumericalError
from eckart.measuring.protocol import Mean
from eckart.progress import Progress, silent, track
from eckart.support.not_finite import exp

ROWS = 512  # of logits in float32 at a time


@dataclass(frozen=True)
class Perplexity:
    """`value = exp(nll)`, infinite beyond a float; `nll` in nats per token.

    `tokens` predicted tokens over `windows` windows.
    """

    value: float
    nll: float
    tokens: int
    windows: int

    @staticmethod
    def of(sums: Sequence[Tensor], counts: Sequence[int], mean: Mean) -> "Perplexity":
        """From the summed loss of each window, float64, and how many tokens were predicted there.

        Raises `NumericalError` for a loss that is not finite (published evaluators skip such windows silently).
        """
        for number, nll in enumerate(sums):
            if not torch.isfinite(nll):
                raise NumericalError(f"the loss of window {number} is {nll.item()}; evaluate in float32.")
        totals, tokens = torch.stack(list(sums)), torch.tensor(counts, dtype=torch.float64)
        nll_mean = float(totals.sum() / tokens.sum() if mean == "token" else (totals / tokens).mean())
        return Perplexity(exp(nll_mean), nll_mean, int(tokens.sum()), len(sums))


def perplexity(
    model: torch.nn.Module,
    windows: Sequence[Tensor],
    *,
    mean: Mean = "token",
    progress: Progress = silent,
    stage: str = "measure",
) -> Perplexity:
    """Perplexity of a causal language model on windows of token ids, each `[length]`.

    Raises `NumericalError` when a window's loss is not finite.
    """
    sums = []
    for number, window in enumerate(track(windows, stage, len(windows), progress)):
        nll = window_nll(model, window)
        if not torch.isfinite(nll):
            raise NumericalError(f"the loss of window {number} is {nll.item()}; evaluate in float32.")
        sums.append(nll)
    return Perplexity.of(sums, [len(window) - 1 for window in windows], mean)


def window_nll(model: torch.nn.Module, window: Tensor) -> Tensor:
    """Summed negative log-likelihood of tokens 1.. of one window, float64 scalar on the CPU."""
    return nll_of(window_logits(model, window), window)


@torch.inference_mode()
def window_logits(model: torch.nn.Module, window: Tensor) -> Tensor:
    """Logits of what follows each token of a window but the last, `[length - 1, vocabulary]`."""
    ids = window.to(next(model.parameters()).device)[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits


@torch.inference_mode()
def nll_of(logits: Tensor, window: Tensor) -> Tensor:
    """Summed negative log-likelihood of tokens 1.. under logits `[length - 1, vocabulary]`, float64 on the CPU."""
    total = torch.zeros((), dtype=torch.float64)
    labels = window[1:].to(logits.device)
    for rows, part in zip(torch.split(logits, ROWS), torch.split(labels, ROWS), strict=True):
        total += F.cross_entropy(rows.float(), part, reduction="sum").double().cpu()
    return total
