"""Recover: a short distillation of all factors at once against the dense model's predictions."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from eckart.blocks import Stream, open_stream, run_tail, split_batches
from eckart.errors import NumericalError, OptionError
from eckart.linear import FactorizedLinear, swap_
from eckart.progress import track
from eckart.refiners.base import Refinement, Refiner

Tensor = torch.Tensor


@final
@dataclass(frozen=True)
class Recover(Refiner):
    """Minimises KL(dense || compressed) over the factors, on the calibration windows; all else is frozen.

    AdamW without weight decay, `windows_per_step` windows a step, the learning rate falling to zero
    along a cosine over `epochs`. The last `held_out` share of the windows is never trained on: the
    factors of the epoch that is best there are kept, those from before if none is better, and an
    epoch that is worse ends it.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    windows_per_step: int = 2
    held_out: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.windows_per_step < 1:
            raise OptionError("recover.epochs and recover.windows_per_step must be at least 1.")
        if not self.learning_rate > 0:
            raise OptionError(f"recover.learning_rate is {self.learning_rate:g}, but must be positive.")
        if not 0 < self.held_out < 1:
            raise OptionError(f"recover.held_out is {self.held_out:g}, but must lie strictly between 0 and 1.")

    def refine_(self, work: Refinement) -> None:
        layers = [work.model.get_submodule(name) for name in work.dense_weights]
        factors = list({id(p): p for layer in layers for p in _factors(layer)}.values())
        held = min(max(1, round(self.held_out * len(work.windows))), len(work.windows) - 1)
        if not factors or held < 1:
            return  # nothing to train, or one window only, which cannot be both
        train, test = work.windows[:-held], work.windows[-held:]
        with dense_again(work), torch.no_grad():
            batches = [*split_batches(train, self.windows_per_step * train.shape[1]), *split_batches(test, 1)]
            dense = _past_the_blocks(work, batches)
        steps = range(len(batches) - held)
        best, before = _held_out_kl(work, dense, range(len(steps), len(batches))), _copy(factors)
        with _only_trained(work.model, factors):
            optimizer = torch.optim.AdamW(factors, lr=self.learning_rate, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(steps))
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.epochs):
                order = torch.randperm(len(steps), generator=generator).tolist()
                for index in track(order, "recover", len(order), work.progress):
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        _kl(work, dense, index).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                kl = _held_out_kl(work, dense, range(len(steps), len(batches)))
                if not kl < best:
                    break
                best, before = kl, _copy(factors)
        for factor, value in zip(factors, before, strict=True):
            factor.data.copy_(value)


def _factors(layer: nn.Module) -> list[nn.Parameter]:
    """The weights of a factorised layer; its bias stays."""
    return [p for name, p in layer.named_parameters() if name.endswith("weight")]


@contextmanager
def dense_again(work: Refinement) -> Iterator[None]:
    """The model with its dense weights back in place, for as long as the context lasts."""
    factorised = {}
    for name, weight in work.dense_weights.items():
        old = work.model.get_submodule(name)
        assert isinstance(old, FactorizedLinear)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if old.bias is not None:
            dense.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
        factorised[name] = swap_(work.model, name, dense.train(old.training))
    try:
        yield
    finally:
        for name, old in factorised.items():
            swap_(work.model, name, old)


def _past_the_blocks(work: Refinement, batches: Sequence[Tensor]) -> Stream:
    """What leaves the last block of the model as it is now, for every batch: far smaller than logits."""
    blocks = work.layout.block_list(work.model)
    stream = open_stream(work.model, blocks, batches)
    for block in track(blocks, "dense run", len(blocks), work.progress):
        for index, hidden, call in stream.inputs():
            stream.hidden[index] = call.run(block, hidden)
        stream.position += 1
    return stream


def _kl(work: Refinement, dense: Stream, index: int) -> Tensor:
    """Mean over the tokens of one batch of KL(dense || model), nats; gradients flow to the model."""
    with torch.no_grad():
        target = run_tail(work.model, work.layout.block_list(work.model), dense, index).logits.float().log_softmax(-1)
    logits = work.model(input_ids=dense.batches[index], use_cache=False).logits
    kl = nn.functional.kl_div(logits.float().log_softmax(-1), target, reduction="none", log_target=True)
    return kl.sum(-1).mean()


@torch.no_grad()
def _held_out_kl(work: Refinement, dense: Stream, indices: Sequence[int]) -> float:
    values = [float(_kl(work, dense, index)) for index in indices]
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        raise NumericalError("recover: the held-out divergence is NaN or infinite; lower recover.learning_rate.")
    return mean


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@contextmanager
def _only_trained(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to `trained` alone; afterwards every parameter asks for gradients as before."""
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in asked:
            parameter.requires_grad_(was)
            parameter.grad = None
