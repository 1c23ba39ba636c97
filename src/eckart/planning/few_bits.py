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
from eckart.maths.rounding import Rounded, Triangle, fit_grid, loss_of, rounded
from eckart.maths.rounding_factors import RoundedPair, RoundedSum, rounded_pair, rounded_pivoted, rounded_sum, tails_of
from eckart.maths.rounding_loss import expected_loss, expected_of_ranges
from eckart.storages._packed_matrix import packed_tensors
from eckart.storages.packed_sum import CORRECTION_BITS
from eckart.types import Entry, Form, Group, Packing

MEASURED = (2, 3, 4)  # bits that are tried; with more little is cut off at the ends, and theory says the loss
PAIR_WIDTHS = (3, 4, 5, 6, 8)
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
        weight = self.weight.double()
        plain = float(_of_ranges(weight, packing.group, right, left).sum())
        found, against_plain, cut_off = [], {}, 1.0
        for bits in sorted(packing.widths):
            grid = fit_grid(weight, bits, packing.group, None if right is None else right.costs)
            told = expected_loss(grid, weight.shape[1], right, left)
            if bits in MEASURED:
                left_over = rounded(weight, bits, packing.group, h, g).weight - weight
                error = loss_of(left_over, h, g)
                if "packed_sum" in packing.storages:
                    found += self._sums(tails_of(left_over, h, g), bits, packing.group)
                cut_off = error / told if bits == 4 and told > 0 else 1.0
            else:
                error = told * cut_off ** 0.5 ** (bits - 4)  # what the ends cost, in logarithms, halves with every bit
            against_plain[bits] = error / max(plain / (2**bits - 1) ** 2, 1e-300)
            if "packed" in packing.storages:
                found.append(self._form("packed", None, bits, packing.group, error))
        if "packed_pair" in packing.storages:
            found += self._pairs(right, left, against_plain, packing)
        return tuple(found)

    def _form(self, storage: str, rank: int | None, bits: int, group: int, error: float) -> Form:
        size = ledger.size_of(self.group, rank or 0, None, bits, group)
        return Form(storage, rank, bits, group, storages.find(storage).bytes(size, 0), error)

    def _sums(self, tails: Tensor, bits: int, group: int) -> list[Form]:
        """A correction loses what its cut of the rounding error leaves; what its own 8 bits lose is far below that."""
        ranks = [rank for rank in SUM_RANKS if rank < self.group.full_rank // 2]
        return [self._form("packed_sum", rank, bits, group, float(tails[rank])) for rank in ranks]

    def _pairs(
        self, right: Triangle | None, left: Triangle | None, against_plain: Mapping[int, float], packing: Packing
    ) -> list[Form]:
        """What a cut loses, and its two factors by the ranges of their groups.

        In the gauge of `rounded_pair` row i of the basis and column i of the coefficients are the same at every rank.
        Coefficients that are fitted anew make up for the part of the basis's error that lies among its own rows.
        """
        basis, coefficients = self.decomposition.decomposition.directions
        tails, inputs = self.decomposition.spectrum.tails, basis.shape[1]
        of_basis = _of_ranges(basis, packing.group, right, None).cumsum(0)
        weights = self.decomposition.spectrum.values.to(basis).square()
        costs = None if left is None else left.costs
        forms = []
        for rank in range(PAIR_STEP, self.group.full_rank, PAIR_STEP):
            by_range = expected_of_ranges(coefficients[:, :rank], packing.group, weights[:rank], costs).sum()
            plain = float(of_basis[rank - 1] * (1 - rank / inputs) + by_range)
            for bits in (b for b in packing.widths if b in PAIR_WIDTHS):
                error = float(tails[rank]) + against_plain[bits] * plain / (2**bits - 1) ** 2
                forms.append(self._form("packed_pair", rank, bits, packing.group, error))
        return forms

    def packed(self, entry: Entry) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The entry of a configuration and the tensors, without bias, that store the group as an entry says.

        Raises `PlanError` for a group that shares its basis, or a storage that does not pack.
        """
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
        if entry.storage not in makers:
            raise PlanError(f"{self.group.name}: storage {entry.storage!r} has no bits; write one that packs.")
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


def _of_ranges(weight: Tensor, group: int, right: Triangle | None, left: Triangle | None) -> Tensor:
    return expected_of_ranges(
        weight, group, None if right is None else right.costs, None if left is None else left.costs
    )


def _gram(side: Side) -> Tensor | None:
    return side.gram if side.diagonal is None else side.diagonal.diag()


def check_single(groups: Sequence[Group]) -> None:
    """Raise `PlanError` for a group of several layers, which cannot be packed yet."""
    for group in groups:
        if len(group.targets) > 1:
            raise PlanError(
                f"{group.name}: shares its basis with {group.names[1]}, and what shares a basis cannot have few bits "
                "yet; group nothing (grouping.size=1), or keep 16 bits."
            )
