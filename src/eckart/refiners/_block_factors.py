"""The factors of one block's layers, for refiners that go block by block: which may change, reading, writing."""

from collections import Counter
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor, nn

from eckart.errors import DataError, NumericalError
from eckart.refiners._block_forms import BlockFactors
from eckart.refiners.base import Refinement
from eckart.storages import FactorizedLayer
from eckart.types import Target


def plain_pairs(refinement: Refinement) -> frozenset[str]:
    """Names of the factorised targets that are a plain pair of factors, without preserved columns."""
    return frozenset(
        name
        for name, layer in refinement.model.named_modules()
        if name in refinement.dense_weights and isinstance(layer, FactorizedLayer) and layer.refinable
    )


def refinable(refinement: Refinement) -> frozenset[str]:
    """Names of the targets that are a plain pair with a basis of their own, so that both factors may change."""
    layers = {n: m for n, m in refinement.model.named_modules() if isinstance(m, FactorizedLayer)}
    readers = Counter(id(layer.basis.weight) for layer in layers.values())
    return frozenset(name for name in plain_pairs(refinement) if readers[id(layers[name].basis.weight)] == 1)


def has_unseen(refinement: Refinement) -> bool:
    """Whether there is text that no statistic has seen, so that factors made from all windows can be judged fairly."""
    return refinement.unseen is not None and len(refinement.unseen) > 0


def split_windows(
    windows: Tensor, size: int, held_out: float, unseen: Tensor | None = None
) -> tuple[list[Tensor], list[int], list[int]]:
    """Batches of windows `[batch, length]`, and the numbers of those to train on and of those held out.

    The `unseen` windows are held out where there are any, else the last `ceil(held_out * windows)`. Raises
    `DataError` for fewer than two windows.
    """
    if unseen is None or not len(unseen):
        aside = ceil(held_out * len(windows))
        if len(windows) < 2 or aside >= len(windows):
            raise DataError(f"{len(windows)} windows, but a share must be held out; calibrate on two at least.")
        windows, unseen = windows[: len(windows) - aside], windows[len(windows) - aside :]
    train, rest = torch.split(windows, size), torch.split(unseen, size)
    return [*train, *rest], list(range(len(train))), list(range(len(train), len(train) + len(rest)))


def factors_of(block: nn.Module, targets: Sequence[Target]) -> BlockFactors:
    """Copies of the factors that are in the block."""
    layers = {target.place: block.get_submodule(target.place) for target in targets}
    return {
        kind: (layer.basis.weight.detach().clone(), layer.coefficients.weight.detach().clone())
        for kind, layer in layers.items()
        if isinstance(layer, FactorizedLayer)
    }


@torch.no_grad()
def put_(block: nn.Module, factors: BlockFactors) -> None:
    """Copy factors into the block's layers. Raises `NumericalError` naming the layer for NaN or infinity."""
    for kind, (basis, coefficients) in factors.items():
        layer = block.get_submodule(kind)
        assert isinstance(layer, FactorizedLayer)
        if not (torch.isfinite(basis).all() and torch.isfinite(coefficients).all()):
            raise NumericalError(f"{kind}: NaN or infinity in its refined factors.")
        layer.basis.weight.copy_(basis)
        layer.coefficients.weight.copy_(coefficients)
