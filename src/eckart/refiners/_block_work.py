"""The blocks that a refiner has finished, kept in the work folder: a killed run resumes at its block."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from eckart.plans.plan import Plan
from eckart.refiners._block_factors import put_
from eckart.refiners._block_forms import BlockFactors
from eckart.refiners.base import Refinement
from eckart.support.versions import versions
from eckart.support.work import Key, WorkFolder


class BlockWork:
    """Pieces of one refiner with these options on this model, plan and windows; of no other run.

    Hidden states are not kept: a resumed run takes its streams through the finished blocks again.
    """

    def __init__(self, refinement: Refinement, refiner: str, options: Mapping[str, Any]) -> None:
        key = Key(
            "blocks",
            refiner=refiner,
            options=options,
            model=refinement.model,
            blocks=refinement.layout.blocks,
            plan=Plan(refinement.plan.entries).to_dict(),
            dense_weights=refinement.dense_weights,
            windows=refinement.windows,
            unseen=refinement.unseen,
            versions=versions(),
        )
        self.folder = WorkFolder(refinement.work, key)

    def restore_(self, index: int, block: nn.Module) -> dict[str, Any] | None:
        """Put the finished factors of block `index` in and return its notes; None if it is not finished."""
        record = self.folder.find(f"block-{index:04d}")
        if record is None:
            return None
        tensors, notes = record
        for kind in {name.rpartition(".")[0].rpartition(".")[0] for name in tensors}:
            put_(block, {kind: (tensors[f"{kind}.basis.weight"], tensors[f"{kind}.coefficients.weight"])})
        return notes

    def write(self, index: int, factors: BlockFactors, notes: Mapping[str, Any]) -> None:
        """Write what a finished block ended with."""
        tensors = {f"{kind}.basis.weight": basis for kind, (basis, _) in factors.items()}
        tensors |= {f"{kind}.coefficients.weight": coefficients for kind, (_, coefficients) in factors.items()}
        self.folder.write(f"block-{index:04d}", tensors, notes)
