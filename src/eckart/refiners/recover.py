"""Recover: a short distillation of all factors at once against the dense model's predictions."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError, OptionError
from eckart.maths.divergence import from_log_probabilities
from eckart.model.operators import dense_again
from eckart.model.residence import residence_of
from eckart.model.walk import Stream, open_stream, pass_blocks, run_tail, split_batches
from eckart.progress import track
from eckart.refiners.base import Refinement, Refiner
from eckart.text.self_text import write_windows

log = logging.getLogger(__name__)

BETAS = (0.9, 0.95)  # a run has too few steps for a longer memory


@final
@dataclass(frozen=True)
class Recover(Refiner):
    """Minimises KL(dense || compressed) over the factors; all else is frozen.

    Trains on the calibration windows and on `written` more that the dense model writes itself, each from a random token
    on: text of every kind, so that more is recovered than the calibration text (LOG.md).

    AdamW without weight decay, `windows_per_step` windows a step. The learning rate of a factor is `learning_rate`
    times the root mean square of its entries (the two factors of a matrix may differ tenfold in scale) times the root
    of the KL from the dense model at the start, in nats per token, at most 1. It rises over the first `warm_up` share
    of the steps and falls to zero along a cosine. Each epoch cuts the text into windows anew, so that every token
    gets another past.

    After each of `epochs` the next-token loss is taken on text that the statistics have not seen or, where there is
    none, on the last `held_out` share of the windows, which are then not trained on. The factors with the lowest loss
    are kept, those from before if none is lower. (The KL is noted, too, but does not decide: a few thousand tokens
    are soon learned by heart, and a model that is less sure where it was wrong predicts text better without being
    nearer to the dense one; LOG.md.)

    `label_weight` is the weight of the next-token loss on the text itself. That fits the model to this text, which
    is more than recovery, and makes it worse on others. With 0 it learns from the dense model alone.
    """

    epochs: int = 3
    written: int = 32
    learning_rate: float = 1e-3
    windows_per_step: int = 1
    warm_up: float = 0.1
    held_out: float = 0.125
    label_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.windows_per_step < 1:
            raise OptionError("recover.epochs and recover.windows_per_step must be at least 1.")
        if not self.learning_rate > 0:
            raise OptionError(f"recover.learning_rate is {self.learning_rate:g}, but must be positive.")
        if not 0 < self.held_out < 1:
            raise OptionError(f"recover.held_out is {self.held_out:g}, but must lie strictly between 0 and 1.")
        if self.written < 0:
            raise OptionError(f"recover.written is {self.written}, but must not be negative.")
        if not self.label_weight >= 0:
            raise OptionError(f"recover.label_weight is {self.label_weight:g}, but must not be negative.")
        if not 0 <= self.warm_up < 1:
            raise OptionError(f"recover.warm_up is {self.warm_up:g}, but must lie in [0, 1).")

    @property
    def needs_predictions(self) -> bool:
        return True

    def refine_(self, refinement: Refinement) -> None:
        layers = [refinement.model.get_submodule(name) for name in refinement.dense_weights]
        factors = list({id(p): p for layer in layers for p in _factors(layer)}.values())
        train, test = self._split(refinement)
        if not factors:
            return
        if not len(test):
            log.warning("recover: nothing to judge on, one window and no text behind it; factors stay as they were")
            return
        train = torch.cat([train, self._own_text(refinement, train)])
        judged = _past_the_blocks(refinement, split_batches(test, 1))
        reached, best = [_judge(refinement, judged, "before any step; check the model")], _copy(factors)
        steps = -(-len(train) // self.windows_per_step)
        with _only_trained(refinement.model, factors):
            rate = self.learning_rate * math.sqrt(min(1.0, max(0.0, reached[0][1])))
            groups = [{"params": [factor], "lr": rate * _root_mean_square(factor)} for factor in factors]
            optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate(self.epochs * steps))
            generator = torch.Generator().manual_seed(self.seed)
            for epoch in range(self.epochs):
                ids = recut(train, epoch * train.shape[1] // self.epochs)
                dense = _past_the_blocks(refinement, torch.split(ids, self.windows_per_step))
                order = torch.randperm(steps, generator=generator).tolist()
                for index in track(order, f"recover {epoch + 1}/{self.epochs}", steps, refinement.progress):
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        self._loss(refinement, dense, index).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                reached.append(_judge(refinement, judged))
                if reached[-1] == min(reached):
                    best = _copy(factors)
        for factor, value in zip(factors, best, strict=True):
            factor.data.copy_(value)
        notes = {name: [float(f"{r[i]:.6g}") for r in reached] for i, name in enumerate(("loss", "kl"))}
        refinement.notes.append({"refiner": "recover", **notes, "kept_epoch": reached.index(min(reached))})

    def _split(self, refinement: Refinement) -> tuple[Tensor, Tensor]:
        """The windows to train on, and those to judge on."""
        if refinement.unseen is not None and len(refinement.unseen):
            return refinement.windows, refinement.unseen
        windows = refinement.windows
        aside = min(max(1, round(self.held_out * len(windows))), len(windows) - 1)
        return windows[: len(windows) - aside], windows[len(windows) - aside :]

    def _own_text(self, refinement: Refinement, train: Tensor) -> Tensor:
        """Windows that the dense model writes, `[written, length]`."""
        if not self.written:
            return train[:0]
        if refinement.tokenizer is None:
            raise OptionError("recover.written asks for text by the model, which needs its tokenizer; pass one.")
        generator = torch.Generator().manual_seed(self.seed)
        with dense_again(refinement.model, refinement.dense_weights):
            windows = write_windows(
                refinement.model,
                refinement.tokenizer,
                [],
                self.written,
                train.shape[1],
                generator,
                progress=refinement.progress,
            )
        return windows.to(train.device)

    def _loss(self, refinement: Refinement, dense: Stream, index: int) -> Tensor:
        """What is minimised, on one batch."""
        expected, candidate = _log_probabilities(refinement, dense, index)
        loss = from_log_probabilities(expected, candidate).mean()
        if self.label_weight:
            loss = loss + self.label_weight * _next_token_loss(candidate, dense.batches[index])
        return loss

    def _rate(self, steps: int) -> Callable[[int], float]:
        """The learning rate after so many of `steps` steps, as a share of the highest."""
        warm = max(1, round(self.warm_up * steps))
        return lambda done: min(1.0, (done + 1) / warm) * (1 + math.cos(math.pi * done / steps)) / 2


def _factors(layer: nn.Module) -> list[nn.Parameter]:
    """The weights of a factorised layer; its bias stays."""
    return [p for name, p in layer.named_parameters() if name.endswith("weight")]


def _root_mean_square(factor: Tensor) -> float:
    return float(factor.detach().float().square().mean().sqrt())


def recut(windows: Tensor, offset: int) -> Tensor:
    """The same tokens cut `offset` tokens further on, `[windows, length]`; the first ones go to the end."""
    return windows.flatten().roll(-offset).reshape(windows.shape)


@torch.no_grad()
def _past_the_blocks(refinement: Refinement, batches: Sequence[Tensor]) -> Stream:
    """What leaves the last block of the dense model, for every batch: far smaller than logits."""
    with dense_again(refinement.model, refinement.dense_weights):
        residence = residence_of(refinement.model, refinement.layout)
        stream = open_stream(refinement.model, residence, batches)
        return pass_blocks(residence, stream, "dense run", refinement.progress)


def _log_probabilities(refinement: Refinement, dense: Stream, index: int) -> tuple[Tensor, Tensor]:
    """Of the dense model and of the model, on one batch, `[batch, length, vocabulary]`; gradients flow to the model."""
    with torch.no_grad():
        expected = run_tail(refinement.model, residence_of(refinement.model, refinement.layout), dense, index).logits
    candidate = refinement.model(input_ids=dense.batches[index], use_cache=False).logits
    return expected.float().log_softmax(-1), candidate.float().log_softmax(-1)


def _next_token_loss(log_probabilities: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-probability of the text's own next token, nats."""
    return -log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean()


@torch.no_grad()
def _judge(
    refinement: Refinement, dense: Stream, otherwise: str = "after training; lower recover.learning_rate"
) -> tuple[float, float]:
    """Mean next-token loss and KL, nats per token, over batches of one length; `otherwise` ends the refusal."""
    sums = [0.0, 0.0]
    for index in range(len(dense.batches)):
        expected, candidate = _log_probabilities(refinement, dense, index)
        sums[0] += float(_next_token_loss(candidate, dense.batches[index]))
        sums[1] += float(from_log_probabilities(expected, candidate).mean())
    loss, kl = (total / len(dense.batches) for total in sums)
    if not math.isfinite(loss):
        raise NumericalError(f"recover: the held-out loss is NaN or infinite {otherwise}.")
    return loss, kl


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@contextmanager
def _only_trained(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to `trained` alone; afterwards every parameter asks for gradients as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)
            parameter.grad = None
