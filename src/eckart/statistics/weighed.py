"""Inputs weighed by what they matter: the token's `x x^T` times `g^T G^-1 g / out` in the place of `x x^T`.

Half a step of the flip-flop that fits both Kronecker factors of the Fisher information together (Dutilleul 1999,
doi 10.1080/00949659908811970): the gradient Gram G stays as it is, and the input Gram gives each token the weight that
its gradient g has under it. The weights have the mean 1. They need G before the first token is weighed, and so one more
recomputation of the block.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eckart.model.operators import operator
from eckart.statistics.recomputed import Backward, Use, recompute
from eckart.statistics.sums import Gram, Statistics
from eckart.types import Target

SHRINKAGE = 0.1  # of G towards its mean diagonal, before it is inverted


class TokenWeights:
    """What the gradients `[tokens, out]` at each target of a block weigh, in the Grams of all of them."""

    def __init__(self, grams: Mapping[str, Gram], predictions: int) -> None:
        self.roots = {name: _inverse_root(gram.matrix / predictions) for name, gram in grams.items()}

    @staticmethod
    def of(block: nn.Module, targets: Sequence[Target], at: Backward) -> "TokenWeights":
        """Recompute the block once for the gradient Grams `[out, out]`."""
        grams: dict[str, Gram] = {}
        predictions = 0
        for index in range(len(at.calls)):
            uses = recompute(block, targets, at, index).uses
            predictions += at.gradients[index].shape[0] * (at.gradients[index].shape[1] - 1)
            for use in uses:
                if use.gradient is not None:
                    gram = grams.setdefault(use.target.name, Gram(use.target.out_features, use.gradient.device))
                    gram.add_(use.gradient)
        return TokenWeights(grams, predictions)

    def __call__(self, target: Target, gradient: Tensor) -> Tensor:
        """`g^T G^-1 g / out` of every token, `[tokens]`, float32."""
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        return (flat @ self.roots[target.name]).square().mean(-1)


def add_weighed(statistics: Statistics, use: Use, block: nn.Module, weights: Tensor, whole_gram: bool) -> None:
    """Add the inputs of a layer (or its outputs without the bias, if that Gram is smaller), weighed `[tokens]`."""
    target, x = use.target, use.x.reshape(-1, use.x.shape[-1])
    statistics.input_energy += float((x.float().square().mean(-1) * weights).sum(dtype=torch.float64))
    if target.out_features <= target.in_features and not whole_gram:
        bias = operator(block, target.kind).bias
        y = use.y if bias is None else use.y - bias
        if statistics.output_gram is None:
            statistics.output_gram = Gram(target.out_features, x.device)
        statistics.output_gram.add_(y.reshape(-1, y.shape[-1]) * weights.sqrt()[:, None])
        return
    if statistics.input_gram is None:
        statistics.input_gram = Gram(target.in_features, x.device)
    statistics.input_gram.add_(x * weights.sqrt()[:, None])


def _inverse_root(gram: Tensor) -> Tensor:
    """`R` with `R R^T = ((1 - a) G + a mean(diag G) I)^-1`, float32."""
    shrunk = (1 - SHRINKAGE) * gram
    mean = float(gram.diagonal().mean())
    shrunk.diagonal().add_(SHRINKAGE * mean if mean > 0 else 1.0)
    root: Tensor = torch.linalg.cholesky(shrunk)
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, identity, upper=False)
    return inverse.T.float()
