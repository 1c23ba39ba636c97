"""Descend on one block's output error, all its factorised linears together, with an adaptive stop.

The error is `sum |y - Block(x; factors)|^2 / sum |y|^2`, in the plain norm or in that of a metric. Batches of
training windows give gradients; held-out windows decide when to stop and which state is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi

import torch
from torch import Tensor
from torch.func import functional_call

from eckart.refiners._block_forms import BlockFactors, BlockForm
from eckart.refiners._two_streams import AtBlock

CLIP = 1.0  # of the common gradient norm
CHECKS = 5  # the stop rule looks this many checks back
LAST_RATE = 0.1  # of the first rate, at the last step (cosine)


@dataclass(frozen=True)
class Schedule:
    """At most `steps` steps; a check every `check_every`; stop when `CHECKS` checks improved by less than `stop`."""

    steps: int
    rate: float
    check_every: int
    stop: float


@dataclass(frozen=True)
class Descent:
    """`best` error on held-out windows with its `factors`, after how many `steps` the descent ended."""

    best: float
    factors: BlockFactors
    steps: int


class BlockError:
    """The output error of one block for given factors. `aims[i]` is what batch i should give.

    With a `metric` G `[width, width]` squares are `e^T G e` for each token, without one `e^T e`.
    """

    def __init__(self, here: AtBlock, aims: Sequence[Tensor], metric: Tensor | None = None) -> None:
        self.here, self.aims, self.metric = here, aims, metric
        self.sizes = [float(self._square(aim.double())) for aim in aims]

    def of(self, factors: BlockFactors, index: int) -> Tensor:
        """Relative squared error on batch `index`, differentiable in the factors."""
        return self._squares(factors, index) / max(self.sizes[index], 1e-30)

    @torch.no_grad()
    def over(self, factors: BlockFactors, batches: Sequence[int]) -> float:
        """Relative squared error over several batches; empty factors are the block as it is."""
        total = sum(self._squares(factors, index).double().item() for index in batches)
        return total / max(sum(self.sizes[index] for index in batches), 1e-30)

    def _squares(self, factors: BlockFactors, index: int) -> Tensor:
        parameters = {
            f"{kind}.{part}.weight": tensor
            for kind, pair in factors.items()
            for part, tensor in zip(("basis", "coefficients"), pair, strict=True)
        }

        def block(*args: object, **kwargs: object) -> object:
            return functional_call(self.here.block, parameters, args, kwargs)

        output = self.here.run(index, block)
        return self._square(output - self.aims[index])

    def _square(self, e: Tensor) -> Tensor:
        return e.square().sum() if self.metric is None else (e * (e @ self.metric.to(e.dtype))).sum()


def descend(
    form: BlockForm,
    error: BlockError,
    train: Sequence[int],
    held_out: Sequence[int],
    schedule: Schedule,
    generator: torch.Generator,
    stepped: Callable[[int], None] = lambda done: None,
) -> Descent:
    """Move `form` down the block's error on the batches `train`; keep the state that is best on `held_out`.

    A step takes one batch; every batch comes once before any comes again, in the order that `generator`
    draws. The rate falls as a cosine. A loss that is not finite ends the descent.
    """
    best = _detached(form.factors())
    errors = [error.over(best, held_out)]
    lowest, done, order = errors[0], 0, list[int]()
    for step in range(schedule.steps):
        order = order or [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        with torch.enable_grad():
            loss = error.of(form.factors(), order.pop())
            if not torch.isfinite(loss):
                break
            loss.backward(inputs=form.leaves())  # type: ignore[no-untyped-call]  # dense layers need no gradients
        falling = (1 + cos(pi * step / schedule.steps)) / 2
        form.descend(schedule.rate * (LAST_RATE + (1 - LAST_RATE) * falling), CLIP)
        done = step + 1
        stepped(done)
        if done % schedule.check_every == 0 or done == schedule.steps:
            state = _detached(form.factors())
            errors.append(error.over(state, held_out))
            if errors[-1] < lowest:
                lowest, best = errors[-1], state
            if not isfinite(errors[-1]) or _flat(errors, schedule.stop):
                break
    return Descent(lowest, best, done)


def _flat(errors: Sequence[float], stop: float) -> bool:
    """True when the last `CHECKS` checks lowered the held-out error by less than the share `stop`."""
    return len(errors) > CHECKS and errors[-1 - CHECKS] - errors[-1] < stop * errors[-1 - CHECKS]


@torch.no_grad()
def _detached(factors: BlockFactors) -> BlockFactors:
    return {kind: (basis.detach().clone(), c.detach().clone()) for kind, (basis, c) in factors.items()}
