"""KL divergence of predictions, in nats a token: from log-probabilities, or from two hidden states and one linear head.

The second needs no log-probabilities of the reference. With logits `z = W h + b`, reference probabilities p and
`c = logsumexp(z_p)`,

    KL(p || q) = (h_p - h_q) . (W^T p) + log sum_v exp(z_q - c)_v - log sum_v exp(z_p - c)_v.

So of the reference, only the expected row of the weight is needed and no log-probabilities: an
evaluation is one product with the head and one exponential, in place, over a slice of the vocabulary at a
time. The bias cancels in the first term. Rounding of the logits costs some 1e-7 nats a token; where
that is not small beside the divergence, it is made again from the difference of the logits, `d`,

    KL(p || q) = sum_v p (exp(d) - 1 - d)_v + log(1 + u) - u,    u = sum_v p (exp(d) - 1)_v,

in which every term is of second order, at the price of a second product. `d` may be shifted at will. Products in
float32 (float64 if the weight is), what is summed over slices, subtracted or small in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**22  # logits at a time: 16 MiB in float32, which a last-level cache may hold
SMALL = 1e-3  # nats a token below which rounding of the first form shows (0.02 %), and the second is worth its price
SAFE = 1e20  # sums of exponentials beyond this, or below its inverse, are computed again with their own maximum


@dataclass(frozen=True)
class Head:
    """`z = weight h + bias`; `weight` is `[vocabulary, width]`."""

    weight: Tensor
    bias: Tensor | None

    def slices(self, tokens: int) -> Iterator[tuple[Tensor, Tensor | float]]:
        """`(weight, bias)` of a part of the vocabulary at a time, for so many tokens; at least float32."""
        step = max(1, SLICE_ELEMENTS // max(1, tokens))
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for start in range(0, len(self.weight), step):
            part = slice(start, start + step)
            yield self.weight[part].to(dtype), 0.0 if self.bias is None else self.bias[part].to(dtype)


@dataclass(frozen=True)
class Reference:
    """What a comparison needs of the reference: `state` and `expected` (`W^T p`) `[tokens, width]`, float64;
    `shift` (c) and `log_sum` `[tokens]`."""

    state: Tensor
    expected: Tensor
    shift: Tensor
    log_sum: Tensor


def from_log_probabilities(expected: Tensor, candidate: Tensor) -> Tensor:
    """`KL(expected || candidate)` of each token `[...]`, from log-probabilities `[..., vocabulary]`; differentiable."""
    return torch.nn.functional.kl_div(candidate, expected, reduction="none", log_target=True).sum(-1)


def reference(head: Head, state: Tensor) -> Reference:
    """Of hidden states `[tokens, width]` as they enter the head."""
    shift = _log_sum_exp(head, state)
    expected = torch.zeros(state.shape, dtype=torch.float64, device=state.device)
    total = torch.zeros(len(state), dtype=torch.float64, device=state.device)
    for weight, bias in head.slices(len(state)):
        weights = _shifted(state, shift, weight, bias).exp_()
        expected += weights @ weight
        total += weights.sum(-1)
    return Reference(state.double(), expected / total[:, None], shift, total.log())


def divergence(head: Head, against: Reference, state: Tensor) -> Tensor:
    """`KL(reference || candidate)` of each token, `[tokens]`, nats, float64; `state` is `[tokens, width]`."""
    first = ((against.state - state.double()) * against.expected).sum(-1)
    kl = first + _log_sum(head, state, against.shift) - against.log_sum
    return _small_divergence(head, against, state, -first, kl) if kl.mean() < SMALL else kl


def _small_divergence(head: Head, against: Reference, state: Tensor, mean: Tensor, rough: Tensor) -> Tensor:
    """The second form above, with the differences shifted by their `mean` `[tokens]`; `rough` where it overflows."""
    step, shift = state.double() - against.state, against.shift + against.log_sum.to(against.shift.dtype)
    excess, growth = torch.zeros_like(rough), torch.zeros_like(rough)
    for weight, bias in head.slices(len(state)):
        weights = _shifted(against.state, shift, weight, bias).exp_()
        change = _shifted(step, mean.to(weight.dtype), weight, 0.0)
        grown = change.expm1()
        growth += (weights * grown).sum(-1)
        excess += grown.sub_(change).mul_(weights).sum(-1)
    kl = excess + growth.log1p() - growth
    return torch.where(torch.isfinite(kl), kl, rough)


def _shifted(state: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    """Logits less `shift`, `[tokens, part of the vocabulary]`."""
    return torch.addmm(bias - shift[:, None], state.to(weight.dtype), weight.T)


def _log_sum(head: Head, state: Tensor, shift: Tensor) -> Tensor:
    """`log sum_v exp(z_v - shift)` of each token, `[tokens]`, float64."""
    sums = torch.zeros(len(state), dtype=torch.float64, device=state.device)
    for weight, bias in head.slices(len(state)):
        sums += _shifted(state, shift, weight, bias).exp_().sum(-1)
    logs = sums.log()
    far = ~((sums > 1 / SAFE) & (sums < SAFE))
    if far.any():
        logs[far] = _log_sum_exp(head, state[far]).double() - shift[far]
    return logs


def _log_sum_exp(head: Head, state: Tensor) -> Tensor:
    """`log sum_v exp(z_v)` of each token, `[tokens]`, each slice with its own maximum."""
    none = state.new_zeros(len(state), dtype=torch.promote_types(state.dtype, torch.float32))
    parts = [_shifted(state, none, weight, bias).logsumexp(-1) for weight, bias in head.slices(len(state))]
    return torch.stack(parts).logsumexp(0)
