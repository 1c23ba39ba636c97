"""Change how a factorised layer is stored; the matrix stays the same."""

import torch
from torch import nn

from eckart.linear import FactorizedLinear, PivotedLinear, empty_like, is_factorized, swap_
from eckart.pivot import Pivoted, Pivots, pivoted, unpivoted


@torch.no_grad()
def store_(model: nn.Module, name: str, storage: str, *, pivots: Pivots | None = None) -> nn.Module:
    """Store the factorised layer `name` of a model as "pair" or "pivoted"; returns the layer that is there now.

    `pivots` chooses the side of pivoted storage; by default the smaller one. Raises `ValueError`
    when the layer cannot be stored so: a pivoted layer needs a rank below the full one.
    """
    old = model.get_submodule(name)
    if not is_factorized(old):
        raise ValueError(f"{name}: is a {type(old).__name__}, not a factorised layer; there is nothing to store.")
    if old.spec()["storage"] == storage:
        return old
    if "columns" in (old.spec()["storage"], storage):
        raise ValueError(f"{name}: preserved columns have a storage of their own, which is not changed.")
    if storage == "pivoted":
        assert isinstance(old, FactorizedLinear)
        made = pivoted(old.basis.weight, old.coefficients.weight, pivots)
        new = empty_like(old, {"storage": "pivoted", "rank": old.rank, "pivots": made.pivots})
        assert isinstance(new, PivotedLinear)
        basis, coefficients = made.basis, made.coefficients
        new.index.copy_(made.index)
    else:
        assert isinstance(old, PivotedLinear)
        side: Pivots = "rows" if old.pivots == "rows" else "columns"
        basis, coefficients = unpivoted(Pivoted(old.basis.weight, old.coefficients.weight, old.index, side))
        new = empty_like(old, {"storage": storage, "rank": old.rank})
    new.basis.weight.copy_(basis)
    new.coefficients.weight.copy_(coefficients)
    if new.bias is not None and old.bias is not None:
        new.bias.copy_(old.bias)
    swap_(model, name, new)
    return new
