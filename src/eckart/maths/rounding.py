"""Rounding a matrix to a grid of few bits so that the model's loss grows least. Tensors in, tensors out.

The loss of an error E is `tr(G E H E^T)` (times `1 / (2 N^2)` nats per token, `eckart.factorizers.two_sided`). With
unit lower triangular `H = L_H D_H L_H^T` and `G = L_G D_G L_G^T` it is the sum of `D_G[r] D_H[j] Z[r, j]^2` over
`Z = L_G^T E L_H`. Columns are rounded from the last to the first, and inside a column rows from the last to the
first: each number makes its own `Z[r, j]` as small as the grid allows, given all numbers before it. With `G = I` that
is GPTQ (Frantar et al., arXiv 2210.17323) run from the last column to the first, without either it is rounding to
nearest; both sides: YAQA (arXiv 2505.22988), there with other Grams.

Computed in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a number that there are storages for
GROUP = 64  # inputs that share a scale and a zero
SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7, 0.65, 0.6)  # of a group's range, that a grid is tried with
TILE = 32  # rows and columns of a piece that is rounded number by number; all others meet it as matrix products


@dataclass(frozen=True)
class Grid:
    """What numbers there are: `scale * (code - zero)`, code from 0 to `2^bits - 1`, for each row and group of columns.

    `scales` and `zeros` are `[rows, groups]`, float64; scales are numbers that bfloat16 has, zeros are codes. A group
    is `group` columns that stand side by side; the last may be shorter.
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def spread(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of every number, `[rows, columns]` each."""
        index = torch.arange(columns, device=self.scales.device) // self.group
        return self.scales[:, index], self.zeros[:, index]


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: `codes` `[rows, columns]`, uint8."""

    codes: Tensor
    grid: Grid

    @property
    def weight(self) -> Tensor:
        """`[rows, columns]`, float64."""
        scales, zeros = self.grid.spread(self.codes.shape[1])
        return scales * (self.codes - zeros)


@dataclass(frozen=True)
class Triangle:
    """A Gram as `L D L^T`: `lower` is unit lower triangular `[k, k]`, `diagonal` `[k]`; both float64.

    `order` `[k]` says which index stands where; what stands last is rounded first, and all others make up for it.
    """

    lower: Tensor
    diagonal: Tensor
    order: Tensor

    @staticmethod
    def of(gram: Tensor, *, ordered: bool = True) -> "Triangle":
        """Of a positive semidefinite Gram; one that is singular to rounding gets what makes it definite.

        `ordered` lets the index with the largest diagonal be rounded first, as GPTQ's activation order does: `D` is
        smallest where most others can make up for an error.
        """
        gram = gram.double()
        order = gram.diagonal().argsort(stable=True) if ordered else torch.arange(len(gram), device=gram.device)
        gram = gram[order][:, order]
        mean = float(gram.diagonal().mean())
        jitter = 0.0
        while True:
            factor, failed = torch.linalg.cholesky_ex(gram + jitter * torch.eye(len(gram)).to(gram))
            if not bool(failed):
                diagonal = factor.diagonal()
                return Triangle(factor / diagonal, diagonal.square(), order)
            jitter = 10 * jitter or 1e-12 * (mean if mean > 0 else 1.0)

    @property
    def costs(self) -> Tensor:
        """What an error at each index costs once those that come after it have made up for it: D as the Gram stands."""
        return self.diagonal[self.order.argsort()]


def loss_of(error: Tensor, input_gram: Tensor | None, output_gram: Tensor | None) -> float:
    """`tr(G E H E^T)` of an error `[out, in]`; a Gram that is None is the identity."""
    error = error.double()
    right = error if input_gram is None else error @ input_gram.double()
    left = error if output_gram is None else output_gram.double() @ error
    return float((left * right).sum())


def fit_grid(weight: Tensor, bits: int, group: int = GROUP, importance: Tensor | None = None) -> Grid:
    """The grid for a matrix `[rows, columns]`: ranges from 0 or below to 0 or above, shrunk where that pays.

    A smaller range has finer steps and cuts off the ends. Each group takes the one of `SHRINKS` that makes the error
    of rounding to nearest, squared and weighed by `importance` `[columns]`, smallest. Without it ranges stay whole: by
    the plain error they shrink, too, and SmolLM2 in 4 bits loses for it (perplexity 37.5 in place of 34.1).
    """
    return fit(weight, bits, group, importance)[0]


def fit(weight: Tensor, bits: int, group: int = GROUP, importance: Tensor | None = None) -> tuple[Grid, Tensor]:
    """The same, and the errors that it makes smallest, `[rows, groups]`.

    With `D_H` for importance, `D_G` times these errors says what greedy rounding is going to lose, without doing it:
    each `Z[r, j]` is a rounding error like any other, as far as what has to be made up for stays within the grid.
    """
    grouped = _grouped(weight.double(), group)
    weights = torch.ones(weight.shape[1]).to(grouped) if importance is None else importance.double()
    weights = _grouped(weights[None], group)
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    best = torch.full_like(least, torch.inf)
    scales, zeros, codes = torch.ones_like(least), torch.zeros_like(least), 2**bits - 1
    for shrink in SHRINKS if importance is not None else (1.0,):
        scale = ((most - least) * (shrink / codes)).bfloat16().double()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-least * shrink / scale).round().clamp(0, codes)
        nearest = (grouped / scale[..., None]).round().add_(zero[..., None]).clamp_(0, codes).sub_(zero[..., None])
        error = (nearest.mul_(scale[..., None]).sub_(grouped).square_() * weights).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return Grid(scales, zeros, bits, group), best


def rounded(
    weight: Tensor,
    bits: int,
    group: int = GROUP,
    input_gram: Tensor | None = None,
    output_gram: Tensor | None = None,
    *,
    best: bool = False,
) -> Rounded:
    """A matrix `[out, in]` in `bits` bits, with little loss `tr(G E H E^T)`; a Gram that is None is the identity.

    Scales are searched by what an error in each column costs once the columns after it have made up for it, which is
    `D_H`. The method is greedy: it is nearly always better than GPTQ and rounding to nearest on the same grid, and
    with `best` those are made too, and the one with the least loss is taken.
    """
    right = None if input_gram is None else Triangle.of(input_gram)
    left = None if output_gram is None else Triangle.of(output_gram)
    grid = fit_grid(weight, bits, group, None if right is None else right.costs)
    made = Rounded(two_sided(weight, grid, right, left), grid)
    if best and left is not None:
        others = [Rounded(two_sided(weight, grid, right, None), grid), Rounded(to_nearest(weight, grid), grid)]
        made = min([made, *others], key=lambda one: loss_of(one.weight - weight, input_gram, output_gram))
    return made


def to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Codes of a matrix `[rows, columns]`, each number rounded alone; uint8."""
    scales, zeros = grid.spread(weight.shape[1])
    return ((weight.double() / scales).round() + zeros).clamp(0, grid.most).to(torch.uint8)


def two_sided(weight: Tensor, grid: Grid, right: Triangle | None, left: Triangle | None) -> Tensor:
    """Codes `[out, in]`, uint8, of the greedy rounding above; `right` is of H, `left` of G, None the identity."""
    if right is None and left is None:
        return to_nearest(weight, grid)
    right, left = (
        side or _identity(size, weight) for side, size in zip((right, left), reversed(weight.shape), strict=True)
    )
    weight = weight.double()
    scales, zeros = grid.spread(weight.shape[1])
    problem = _Problem(*(t[left.order][:, right.order] for t in (weight, scales, -zeros, grid.most - zeros)))
    if bool((left.lower.tril(-1) == 0).all()):
        values = _by_columns(problem, right.lower)
    else:
        values = _by_tiles(problem, right.lower, left.lower)
    steps = values[left.order.argsort()][:, right.order.argsort()]
    return (steps + zeros).to(torch.uint8)


class _Problem(NamedTuple):
    """A matrix to round, in the order of its rounding, `[rows, columns]` each; steps stay in `[least, most]`."""

    weight: Tensor
    scales: Tensor
    least: Tensor
    most: Tensor


def _identity(size: int, like: Tensor) -> Triangle:
    ones = torch.ones(size, dtype=torch.float64, device=like.device)
    return Triangle(ones.diag(), ones, torch.arange(size, device=like.device))


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """`[rows, columns]` as `[rows, groups, group]`, filled up with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -columns % group))
    return padded.view(rows, -1, group)


def _by_columns(problem: "_Problem", lower_h: Tensor) -> Tensor:
    """GPTQ from the last column to the first, all rows at once; whole steps from the zero, `[rows, columns]`.

    What a block of columns makes up for comes in one product.
    """
    weight, scales, least, most = (t.T.contiguous() for t in problem)
    targets, errors, steps = weight.clone(), torch.zeros_like(weight), torch.empty_like(weight)
    columns = len(weight)
    for start in range((columns - 1) // TILE * TILE, -1, -TILE):
        stop = min(start + TILE, columns)
        targets[start:stop] -= lower_h[stop:, start:stop].T @ errors[stop:]
        for j in range(stop - 1, start - 1, -1):
            steps[j] = (targets[j] / scales[j]).round_().clamp_(least[j], most[j])
            errors[j] = steps[j] * scales[j] - weight[j]
            targets[start:j] -= lower_h[j, start:j, None] * errors[j]
    return steps.T


def _by_tiles(problem: "_Problem", lower_h: Tensor, lower_g: Tensor) -> Tensor:
    """Both sides; as `_by_columns` otherwise.

    Tiles on an anti-diagonal depend on tiles before it alone, so they are rounded side by side. Columns are turned
    round, so that they are taken from the first to the last, and rows from the last to the first: the numbers of a
    tile that do not depend on one another then lie on a diagonal.
    """
    weight, scales, least, most = problem
    (out_features, in_features), shape = weight.shape, [-(-size // TILE) for size in weight.shape]
    pad = (0, shape[1] * TILE - in_features, 0, shape[0] * TILE - out_features)
    scales = _tiled(torch.nn.functional.pad(scales.flip(1), pad, value=1.0))
    wanted, least, most = (_tiled(torch.nn.functional.pad(t.flip(1), pad)) for t in (weight, least, most))
    before_h, inside_h = _padded(lower_h.tril(-1).flip(0, 1).T, pad[1])
    before_g, inside_g = _padded(lower_g.tril(-1).T, pad[3])
    errors = weight.new_zeros(shape[0] * TILE, shape[1] * TILE)
    excess = errors.new_zeros(errors.shape[1], errors.shape[0])  # E L_H, transposed
    steps = torch.zeros_like(wanted)
    for diagonal in range(sum(shape) - 1):
        places = [
            (shape[0] - 1 - diagonal + j, j) for j in range(shape[1]) if 0 <= shape[0] - 1 - diagonal + j < shape[0]
        ]
        i, j = (torch.tensor(t, device=weight.device) for t in zip(*places, strict=True))
        by_columns, by_rows = weight.new_empty(2, len(places), TILE, TILE)
        for number, (a, b) in enumerate(places):
            rows, columns = slice(a * TILE, (a + 1) * TILE), slice(b * TILE, (b + 1) * TILE)
            torch.mm(errors[rows, : columns.start], before_h[columns, : columns.start].T, out=by_columns[number])
            torch.mm(before_g[rows, rows.stop :], excess[columns, rows.stop :].T, out=by_rows[number])
        tile = _Tiles(wanted[i, j], wanted[i, j] - by_columns, by_rows, scales[i, j], least[i, j], most[i, j])
        steps[i, j] = tile.round_(inside_h[j], inside_g[i])
        for number, (a, b) in enumerate(places):
            errors[a * TILE : (a + 1) * TILE, b * TILE : (b + 1) * TILE] = tile.errors[number]
            excess[b * TILE : (b + 1) * TILE, a * TILE : (a + 1) * TILE] = tile.excess[number]
    whole = steps.permute(0, 2, 1, 3).reshape(errors.shape)
    return whole[:out_features, :in_features].flip(1)


def _padded(matrix: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """A square matrix filled up with zeros, and its tiles on the diagonal, `[tiles, TILE, TILE]`."""
    padded = torch.nn.functional.pad(matrix, (0, pad, 0, pad)).contiguous()
    return padded, torch.stack([padded[i : i + TILE, i : i + TILE] for i in range(0, len(padded), TILE)])


def _tiled(matrix: Tensor) -> Tensor:
    """`[rows, columns]` as `[row of tiles, column of tiles, TILE, TILE]`."""
    rows, columns = (length // TILE for length in matrix.shape)
    return matrix.view(rows, TILE, columns, TILE).permute(0, 2, 1, 3)


class _Tiles:
    """Some tiles that are rounded side by side, `[tiles, TILE, TILE]` each.

    `targets` are what the columns before them leave to be met, `by_rows` what the rows before them ask to be made up
    for. `round_` fills `errors`, from the weight, and `excess`, from the targets, which is transposed.
    """

    def __init__(
        self, weight: Tensor, targets: Tensor, by_rows: Tensor, scales: Tensor, least: Tensor, most: Tensor
    ) -> None:
        self.weight, self.errors, self.excess = weight, torch.zeros_like(weight), torch.zeros_like(weight)
        self.targets, self.by_rows, self.scales, self.least, self.most = targets, by_rows, scales, least, most

    def round_(self, inside_h: Tensor, inside_g: Tensor) -> Tensor:
        """Whole steps from the zero, one diagonal after the other."""
        steps = torch.zeros_like(self.errors)
        for offset in range(1 - TILE, TILE):
            rows = slice(max(0, -offset), min(TILE, TILE - offset))
            columns = slice(rows.start + offset, rows.stop + offset)
            before = self.errors[:, rows, : columns.stop] * inside_h[:, columns, : columns.stop]
            target = _diagonal(self.targets, offset) - before.sum(-1)
            below = self.excess[:, columns, rows.start :] * inside_g[:, rows, rows.start :]
            wanted = target - _diagonal(self.by_rows, offset) - below.sum(-1)
            scale = _diagonal(self.scales, offset)
            step = wanted.div_(scale).round_().clamp_(_diagonal(self.least, offset), _diagonal(self.most, offset))
            value = step * scale
            _diagonal(steps, offset).copy_(step)
            torch.sub(value, _diagonal(self.weight, offset), out=_diagonal(self.errors, offset))
            _diagonal(self.excess, -offset).copy_(value.sub_(target))
        return steps


def _diagonal(tiles: Tensor, offset: int) -> Tensor:
    return tiles.diagonal(offset, 1, 2)
