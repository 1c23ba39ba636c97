"""The metric of the residual stream: what an error at a block's output does to the model's loss.

With g the gradient of the summed next-token loss at a block's output, one for each token, and labels sampled
from the model, `G = (1/N) sum g g^T` is the Fisher information there. To second order an error e raises the
loss by `1/2 e^T G e = 1/2 |L^T e|^2` nats with `G = L L^T`, errors of different tokens taken to be independent:
the left side of `factorizers/two_sided.py`, carried from a layer's output to the block's.
"""

import torch
from torch import Tensor, nn

from eckart.errors import NumericalError
from eckart.model.discovery import Layout
from eckart.model.operators import dense_again
from eckart.model.walk import BATCH_TOKENS
from eckart.progress import Progress, silent
from eckart.refiners.base import Refinement
from eckart.statistics.at_outputs import backward_block
from eckart.statistics.sums import Gram, Need
from eckart.statistics.sweep import backward

LABELS = frozenset({Need.GRADIENT_GRAM})  # sampled from the model's own predictions


def residual_metrics(refinement: Refinement, windows: Tensor, shrinkage: float, seed: int) -> list[Tensor]:
    """The metric `[width, width]` at each block's output of the dense model, float32, in forward order."""
    with dense_again(refinement.model, refinement.dense_weights):
        grams = residual_grams(refinement.model, refinement.layout, windows, seed=seed, progress=refinement.progress)
    return [shrunk(gram.matrix, shrinkage).float() for gram in grams]


def residual_grams(
    model: nn.Module,
    layout: Layout,
    windows: Tensor,
    *,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Gram]:
    """`sum g g^T` `[width, width]` at each block's output of this model, in forward order, by one backward run.

    `windows` is `[windows, length]` token ids, `seed` draws the labels. Raises `NumericalError` naming the
    block where a gradient is NaN or infinite.
    """
    grams = list[Gram]()
    for at in backward(model, layout, windows, LABELS, batch_tokens=batch_tokens, seed=seed, progress=progress):
        gram = Gram(at.gradients[0].shape[-1], at.gradients[0].device)
        for gradient in at.gradients:
            gram.add_(gradient)
        if not bool(torch.isfinite(gram.matrix.diagonal()).all()):
            raise NumericalError(
                f"{layout.blocks}.{at.index}: NaN or infinity in the gradients at its output; calibrate in float32."
            )
        grams.insert(0, gram)
        backward_block(at.block, [], at, LABELS)
    return grams


def shrunk(gram: Tensor, shrinkage: float) -> Tensor:
    """`(1 - a) G / c + a I` with c the mean of the diagonal of G: a Gram `[width, width]` as a metric.

    Divided by c because errors are only compared within a block, and gradients are small numbers to
    square. A Gram of zeros becomes the identity.
    """
    mean = gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return identity if not mean > 0 else (1 - shrinkage) / mean * gram + shrinkage * identity
