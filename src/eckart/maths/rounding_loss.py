"""What rounding is going to lose, without doing it.

Where nothing is cut off at the ends of a grid, the greedy rounding of `eckart.maths.rounding` leaves each of its
`Z[r, j]` anywhere in half a step to either side, so that `tr(G E H E^T)` is `sum D_G[r] D_H[j] step[r, j]^2 / 12`.
"""

import torch
from torch import Tensor

from eckart.maths.rounding import Grid, Triangle


def expected_loss(grid: Grid, columns: int, right: Triangle | None, left: Triangle | None) -> float:
    """The expected `tr(G E H E^T)` of a matrix with `columns` columns rounded to a grid; None is the identity."""
    return float(_weighed(grid.scales.square(), columns, grid.group, right, left)) / 12


def expected_of_ranges(
    weight: Tensor, group: int, input_costs: Tensor | None, output_costs: Tensor | None
) -> Tensor:
    """The same for each row `[rows]` with steps as long as the whole ranges of the groups; divide by `(2^bits - 1)^2`.

    `input_costs` `[columns]` and `output_costs` `[rows]` are `D_H` and `D_G`, None ones.
    """
    rows, columns = weight.shape
    grouped = torch.nn.functional.pad(weight, (0, -columns % group)).view(rows, -1, group)
    ranges = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0)
    costs = weight.new_ones(columns) if input_costs is None else input_costs
    of_groups = torch.nn.functional.pad(costs, (0, -columns % group)).view(-1, group).sum(-1)
    losses = ranges.square() @ of_groups / 12
    return losses if output_costs is None else losses * output_costs


def _weighed(squares: Tensor, columns: int, group: int, right: Triangle | None, left: Triangle | None) -> Tensor:
    costs = squares.new_ones(columns) if right is None else right.costs
    of_groups = torch.nn.functional.pad(costs, (0, -columns % group)).view(-1, group).sum(-1)
    of_rows = squares.new_ones(len(squares)) if left is None else left.costs
    return of_rows @ squares @ of_groups
