"""How far a compressed model's predictions are from the dense model's, in nats per token."""

from collections.abc import Sequence

import torch

from eckart.errors import NumericalError

Tensor = torch.Tensor


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities of every next token of one window `[length]`: `[length - 1, vocabulary]`, float32."""
    ids = window.to(next(model.parameters()).device)[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


@torch.inference_mode()
def mean_kl(model: torch.nn.Module, windows: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """Mean over tokens of KL(dense || model), in nats per token.

    `dense[i]` is what `log_probabilities` says of the dense model on `windows[i]`. Raises
    `NumericalError` when it is not finite.
    """
    total, tokens = 0.0, 0
    for window, reference in zip(windows, dense, strict=True):
        mine = log_probabilities(model, window)
        total += float((reference.exp() * (reference - mine)).sum(dtype=torch.float64))
        tokens += len(reference)
    if not total < float("inf"):
        raise NumericalError(f"the divergence from the dense model is {total}; measure in float32.")
    return total / tokens
