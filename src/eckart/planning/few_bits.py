"""Groups in few bits: what each way to store one would cost and lose, and the packed tensors of the one that is chosen.

Every form is priced by its storage in bytes, so that codes, scales, zeros, indices and padding count alike. Its loss is
predicted in the metric of the group's factorizer; `docs/bits.md` says how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart import ledger, storages
from eckart.errors import PlanError
from eckart.factorizers.base import GroupDecomposition
from eckart.linalg import Side
from eckart.maths.rounding import Rounded, Triangle, fit, loss_of, rounded
from eckart.maths.rounding_factors import RoundedPair, RoundedSum, rounded_pair, rounded_pivoted, rounded_sum, tails_of
from eckart.storages._packed_matrix import packed_tensors
from eckart.storages.packed_sum import CORRECTION_BITS
from eckart.types import Entry, Form, Group, Packing, Target

MEASURED = (2, 3, 4)  # bits that are tried; with more little of what is made up for runs off the ends of a grid
PAIR_WIDTHS = (3, 4, 6, 8)
PAIR_STEP = 16  # of the ranks that pairs are priced at
SUM_RANKS = (4, 8, 16, 32, 64)


@dataclass
class FewBits:
    """A group that may be stored in few bits: its weight `[out, in]` and the Grams of its metric, in float32.

    A Gram that is None is the identity. With `spill` the Grams lie in a file.
    """

    group: Group
    decomposition: GroupDecomposition
    weight: Tensor
    held: "Mapping[str, Tensor] | Path"
    made: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=dict)

    @staticmethod
    def of(decomposition: GroupDecomposition, weight: Tensor, left: Side, right: Side) -> "FewBits":
        """From both sides of the metric, `left` of the outputs, `right` of the inputs."""
        grams = {"input": _gram(right), "output": _gram(left)}
        held = {name: gram.float() for name, gram in grams.items() if gram is not None}
        return FewBits(decomposition.group, decomposition, weight, held)

    def spill(self, folder: Path) -> None:
        """Move the Grams to a file in `folder`, from where they are read back when the group is rounded."""
        assert not isinstance(self.held, Path)
        path = folder / f"{self.group.name}.grams.safetensors"
        save_file({name: gram.cpu().contiguous() for name, gram in self.held.items()}, path)
        self.held = path

    @property
    def grams(self) -> tuple[Tensor | None, Tensor | None]:
        """`(H [in, in], G [out, out])`."""
        held = load_file(self.held) if isinstance(self.held, Path) else self.held
        found = (held.get(name) for name in ("input", "output"))
        h, g = (None if gram is None else gram.to(self.weight.device) for gram in found)
        return h, g

    def forms(self, packing: Packing) -> tuple[Form, ...]:
        """Every way that the recipe allows, with its predicted squared error."""
        if not packing.widths:  # a plan is there already
            return ()
        h, g = self.grams
        right, left = (None if gram is None else Triangle.of(gram) for gram in (h, g))
        weight, group, found = self.weight.double(), packing.group, []
        beyond: dict[int, float] = {}  # by bits: what is lost, over what would be if nothing ran off the ends
        for bits in sorted(packing.widths):
            told = _told(weight, bits, group, None if right is None else right.costs, left)
            error = told * beyond.get(4, 1.0) ** 0.5 ** (bits - 4)  # in logarithms the ends cost half for each bit
            if bits in MEASURED:
                left_over = rounded(weight, bits, group, h, g).weight - weight
                error = loss_of(left_over, h, g)
                if "packed_sum" in packing.storages:
                    found += self._sums(tails_of(left_over, h, g), bits, group)
            beyond[bits] = error / max(told, 1e-300)
            if "packed" in packing.storages:
                found.append(self._form("packed", None, bits, group, error))
        if "packed_pair" in packing.storages:
            found += [
                form for bits in packing.widths if bits in PAIR_WIDTHS for form in self._pairs(right, left, bits, group)
            ]
        return tuple(found)

    def _form(self, storage: str, rank: int | None, bits: int, group: int, error: float) -> Form:
        size = ledger.size_of(self.group, rank or 0, None, bits, group)
        return Form(storage, rank, bits, group, storages.find(storage).bytes(size, 0), error)

    def _sums(self, tails: Tensor, bits: int, group: int) -> list[Form]:
        """A correction loses what its cut of the rounding error leaves; what its own 8 bits lose is far below that."""
        ranks = [rank for rank in SUM_RANKS if rank < self.group.full_rank // 2]
        return [self._form("packed_sum", rank, bits, group, float(tails[rank])) for rank in ranks]

    def _pairs(self, right: Triangle | None, left: Triangle | None, bits: int, group: int) -> list[Form]:
        """What a cut loses, and what rounding its two factors does.

        In the gauge of `rounded_pair` row i of the basis and column i of the coefficients are the same at every rank.
        """
        basis, coefficients = self.decomposition.decomposition.directions
        spectrum, full = self.decomposition.spectrum, self.group.full_rank
        squares = spectrum.values.to(basis).square()
        of_basis = _told_of_bases(basis, squares, bits, group, right)
        forms, whole = [], [0.0]  # what coefficients lose in the groups that are full
        for rank in range(PAIR_STEP, full, PAIR_STEP):
            start = (rank - 1) // group * group
            here = _told(coefficients[:, start:rank], bits, group, squares[start:rank], left)
            of_coefficients = whole[start // group] + here
            whole += [of_coefficients] if rank % group == 0 else []
            error = float(spectrum.tails[rank]) + float(of_basis[rank - 1]) + of_coefficients
            forms.append(self._form("packed_pair", rank, bits, group, error))
        return forms

    def packed(self, entry: Entry) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The entry of a configuration and the tensors, without bias, that store the group as an entry says."""
        key = (entry.storage, entry.rank, entry.bits, entry.group)
        if key not in self.made:
            made = self.round(entry)
            spec = {"storage": entry.storage, "bits": entry.bits, "group": entry.group}
            spec |= {} if entry.rank is None else {"rank": entry.rank}
            self.made[key] = (spec, tensors_of(made))
        return self.made[key]

    def round(self, entry: Entry) -> Rounded | RoundedPair | RoundedSum:
        """The group's weight as an entry stores it."""
        bits, group = entry.bits, entry.group
        assert bits is not None
        assert group is not None
        if entry.storage == "packed":
            return rounded(self.weight, bits, group, *self.grams, best=True)
        assert entry.rank is not None
        if entry.storage == "packed_sum":
            return rounded_sum(self.weight, entry.rank, bits, CORRECTION_BITS, group, *self.grams)
        factors = self.decomposition.truncate(entry.rank)
        makers = {"packed_pair": rounded_pair, "packed_pivoted": rounded_pivoted}
        coefficients = torch.cat(factors.coefficients)
        return makers[entry.storage](self.weight, factors.basis, coefficients, bits, group, *self.grams)


def tensors_of(made: Rounded | RoundedPair | RoundedSum) -> dict[str, Tensor]:
    """What a layer stores, by name below the layer's own."""
    if isinstance(made, Rounded):
        return packed_tensors(made.codes, made.grid.scales, made.grid.zeros, made.grid.bits)
    if isinstance(made, RoundedSum):
        return {**tensors_of(made.matrix), **tensors_of(made.correction)}
    parts = {"basis": made.basis, "coefficients": made.coefficients}
    tensors = {f"{factor}.{name}": t for factor, part in parts.items() for name, t in tensors_of(part).items()}
    return tensors if made.index is None else {**tensors, "index": made.index}


def _told(weight: Tensor, bits: int, group: int, input_costs: Tensor | None, left: Triangle | None) -> float:
    """What rounding a matrix is going to lose, as far as nothing runs off the ends of the grid (`fit`)."""
    errors = fit(weight, bits, group, input_costs)[1].sum(1)
    return float(errors.sum() if left is None else left.costs @ errors)


def _told_of_bases(basis: Tensor, squares: Tensor, bits: int, group: int, right: Triangle | None) -> Tensor:
    """What rounding the first r rows of a basis `[full, in]` is going to lose, for every r, `[full]`.

    `squares` are the diagonal of `B H B^T`. Coefficients that are fitted anew make up for the part of the error that
    lies among the rows themselves: with `P = B L_H D_H^(1/2)`, its rows made unit long, an error in column j of
    `Z` keeps the share `1 - sum_i P[i, j]^2`.
    """
    if right is None:
        costs, unit = basis.new_ones(basis.shape[1]), basis
    else:
        unit = basis[:, right.order] @ right.lower * right.diagonal.sqrt()
        costs, unit = right.costs, unit[:, right.order.argsort()]
    kept = (1 - (unit.square() / squares.clamp(min=1e-300)[:, None]).cumsum(0)).clamp(min=0) * costs
    kept, all_costs = (_grouped(t, group) for t in (kept, costs[None]))
    errors: Tensor = fit(basis, bits, group, costs)[1] / all_costs.clamp(min=1e-300)
    return (errors.cumsum(0) * kept).sum(1)


def _grouped(costs: Tensor, group: int) -> Tensor:
    """Sums over groups of columns, `[rows, groups]`."""
    padded = torch.nn.functional.pad(costs, (0, -costs.shape[1] % group))
    return padded.view(len(costs), -1, group).sum(-1)


def _gram(side: Side) -> Tensor | None:
    return side.gram if side.diagonal is None else side.diagonal.diag()


def check_no_experts(targets: Sequence[Target]) -> None:
    """Raise `PlanError` for an expert, which cannot be packed yet."""
    if experts := [target.name for target in targets if target.expert is not None]:
        raise PlanError(
            f"{experts[0]}: is an expert, and experts cannot have few bits yet ({len(experts)} such targets); "
            "leave them out with --exclude, or ask for keep in place of bits."
        )


def check_single(groups: Sequence[Group]) -> None:
    """Raise `PlanError` for a group of several layers, which cannot be packed yet."""
    for group in groups:
        if len(group.targets) > 1:
            raise PlanError(
                f"{group.name}: shares its basis with {group.names[1]}, and what shares a basis cannot have few bits "
                "yet; group nothing (grouping.size=1), or keep 16 bits."
            )
