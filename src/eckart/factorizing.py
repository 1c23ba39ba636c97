"""Put factors in the place of weights: one layer, or a group of layers with one basis.

What a checkpoint is read with is in `eckart.linear`, which travels with it; this does not.
"""

import torch
from torch import nn

from eckart.factorizers.base import GroupDecomposition
from eckart.linear import FactorizedLinear, KeptColumnsLinear, empty_like, share_basis_, swap_, weight_view
from eckart.types import Entry, Group

Tensor = torch.Tensor


def factorize_group_(model: nn.Module, group: Group, entry: Entry, decomposition: GroupDecomposition) -> None:
    """Replace the members of a group by a pair of factors at the entry's rank; they share the basis.

    Pairs whatever the entry's storage, for refiners to work on; `store_` puts them into that storage.
    """
    assert entry.rank is not None
    factors = decomposition.truncate(entry.rank, entry.kept)
    strips = factors.kept or (None,) * len(group.targets)
    made = [
        factorize_(model, name, factors.basis, coefficients, factors.kept_index, strip)
        for name, coefficients, strip in zip(group.names, factors.coefficients, strips, strict=True)
    ]
    for other in made[1:]:
        share_basis_(made[0], other)


@torch.no_grad()
def factorize_(
    model: nn.Module,
    name: str,
    basis: Tensor,
    coefficients: Tensor,
    kept_index: Tensor | None = None,
    kept: Tensor | None = None,
) -> FactorizedLinear:
    """Replace the linear layer `name` by its factors, keeping bias, device, dtype and mode.

    `basis` is `[rank, in]`, `coefficients` `[out, rank]`; with preserved columns at `kept_index`
    `[kept]`, `kept` is `[out, kept]` and `basis` `[rank, in - kept]`. Raises `ValueError` for any other
    shape.
    """
    old = model.get_submodule(name)
    out_features, in_features = weight_view(old).shape
    rank, columns = basis.shape[0], 0 if kept is None else kept.shape[1]
    if basis.shape != (rank, in_features - columns) or coefficients.shape != (out_features, rank):
        raise ValueError(
            f"{name}: basis is {list(basis.shape)} and coefficients {list(coefficients.shape)}, but a weight "
            f"[{out_features}, {in_features}] with {columns} preserved columns needs "
            f"[rank, {in_features - columns}] and [{out_features}, rank]."
        )
    spec = {"storage": "pair", "rank": rank}
    new = empty_like(old, {"storage": "columns", "rank": rank, "kept": columns} if columns else spec)
    assert isinstance(new, FactorizedLinear)
    if isinstance(new, KeptColumnsLinear):
        assert kept is not None
        new.column_order.copy_(_order(kept_index, columns, in_features))
        new.kept.weight.copy_(kept)
    new.basis.weight.copy_(basis)
    new.coefficients.weight.copy_(coefficients)
    if old.bias is not None:
        new.coefficients.bias.copy_(old.bias)  # type: ignore[arg-type]
    swap_(model, name, new)
    return new


def _order(kept_index: Tensor | None, kept: int, in_features: int) -> Tensor:
    """All columns, `[in]`: the remaining ones, then the kept ones."""
    if kept_index is None or kept_index.shape != (kept,) or (kept_index.diff() <= 0).any():
        raise ValueError(f"{kept} preserved columns need as many rising positions in kept_index.")
    is_kept = torch.zeros(in_features, dtype=torch.bool, device=kept_index.device)
    is_kept[kept_index.long()] = True
    return torch.cat([(~is_kept).nonzero()[:, 0], kept_index.long()])
