"""Module sensitivity by perturbation: how far the model's output moves when one module is cut alone.

All groups rest at the uniform share (plain cuts); one at a time is moved through candidate shares, and
`KL(dense || perturbed)` of the final logits is measured (Duo-SVD, arXiv 2510.19385 v2, step 2). The
sum of the single changes predicts the KL of a whole plan.

It is the whole cost of the method, so: the resting model's inputs of each block are kept and only the
blocks behind a perturbed module run; the dense reference is read once for all shares of a module; a
share that is the resting one is not run at all; and results are journalled as they come, so that an
interrupted run resumes. Cost: one evaluation runs half the model on average and its head once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart import ledger
from eckart.blocks import Stream, final_states, open_stream, split_batches
from eckart.discovery import Layout
from eckart.factorizers.base import GroupDecomposition
from eckart.factorizing import factorize_
from eckart.linear import swap_
from eckart.progress import Progress, silent
from eckart.tail_divergence import TailDivergence
from eckart.types import Group
from eckart.work import Journal, fingerprint, state_of

Tensor = torch.Tensor

VERSION = 2  # of the algorithm: a change that changes its numbers makes old journals void
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Curves:
    """Measured KL in nats, summed over a window's tokens and averaged over windows.

    `losses[group name][share]` is for the model with that group at that share (1.0: dense) and every
    other one at `target`; `resting` is for all of them at `target`. `tokens` is the length of a window.
    """

    target: float
    resting: float
    losses: Mapping[str, Mapping[float, float]]
    tokens: int

    def excess(self, name: str) -> dict[float, float]:
        """`{share: KL - resting KL}` of a group; negative above the target share."""
        return {share: loss - self.resting for share, loss in self.losses[name].items()}


def candidate_rank(group: Group, share: float) -> int | None:
    """Rank of a plain pair that keeps `share` of a group, at least 1; `None`, dense, for 1."""
    if share >= 1:
        return None
    return min(max(1, ledger.largest_rank(group, ledger.share(share) * group.parameters)), group.full_rank)


@torch.no_grad()
def measure_curves(
    model: nn.Module,
    layout: Layout,
    decompositions: Mapping[str, GroupDecomposition],
    windows: Tensor,
    target: float,
    *,
    work: Path,
    depends: Mapping[str, Any],
    shares: Sequence[float] = SHARES,
    only: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Curves:
    """Measure every group at every share (and at `target`); the model is left as it was.

    `windows` is `[windows, length]` token ids. `work` is the folder of the journal and `depends` what
    else decides the decompositions (data, factorizer, their options); the weights, the windows and the
    arguments here are added to it. `only` measures just these groups. Raises `NumericalError` when
    the model's output is not finite.
    """
    shares = sorted({*shares, target})
    journal = Journal(
        work,
        "sensitivity",
        {
            **depends,
            "format": "eckart-sensitivity",
            "version": VERSION,
            "weights": fingerprint({}, state_of(model)),
            "windows": fingerprint({}, [("windows", windows)]),
            "target": target,
            "groups": [d.group.names for d in decompositions.values()],
        },
    )
    names = [name for name in decompositions if only is None or name in only]
    walk = _Walk(model, layout, decompositions, journal, target)
    walk.run(windows, {name: shares for name in names}, progress)
    losses = {name: {share: walk.known[name, share] for share in shares} for name in names}
    return Curves(target, walk.known["", target], losses, windows.shape[1])


class _Walk:
    """One pass over the blocks; `known[group name, share]` fills up, `"", target` is the resting model."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        decompositions: Mapping[str, GroupDecomposition],
        journal: Journal,
        target: float,
    ) -> None:
        self.model, self.blocks = model, layout.block_list(model)
        self.decompositions, self.journal, self.target = decompositions, journal, target
        self.known = {(row["group"], row["share"]): row["kl"] for row in journal.rows}
        self.dense: dict[str, nn.Module] = {}  # what a swapped module replaced first

    def run(self, windows: Tensor, wanted: Mapping[str, Sequence[float]], progress: Progress) -> None:
        """Measure what is wanted and not known yet."""
        pairs = [(name, share) for name, shares in wanted.items() for share in shares]
        missing = [pair for pair in pairs if pair not in self.known and pair[1] != self.target]
        if missing or ("", self.target) not in self.known:
            stream = open_stream(self.model, self.blocks, split_batches(windows, BATCH_TOKENS))
            divergence = TailDivergence(self.model, self.blocks, stream, final_states(self.blocks, stream))
            with self._at(dict.fromkeys(self.decompositions, self.target)):
                self._walk(stream, divergence, missing, progress)
        for pair in pairs:
            if pair[1] == self.target:
                self.known[pair] = self.known["", self.target]

    def _walk(
        self, stream: Stream, divergence: TailDivergence, missing: Sequence[tuple[str, float]], progress: Progress
    ) -> None:
        """Take the resting model's states from block to block; at each, measure the groups that begin there."""
        done = 0
        for index, block in enumerate(self.blocks):
            for name, share in missing:
                if self._first_block(name) == index:
                    progress("sensitivity", done, len(missing))
                    with self._at({name: share}):
                        self._record(name, share, divergence(final_states(self.blocks, stream)))
                    done += 1
            for number, hidden, call in stream.inputs():
                stream.hidden[number] = call.run(block, hidden)
            stream.position += 1
        if ("", self.target) not in self.known:
            self._record("", self.target, divergence(stream.hidden))
        progress("sensitivity", done, len(missing))

    def _record(self, name: str, share: float, value: float) -> None:
        rank = candidate_rank(self.decompositions[name].group, share) if name else None
        self.journal.add({"group": name, "share": share, "rank": rank, "kl": value})
        self.known[name, share] = value

    def _first_block(self, name: str) -> int:
        return min(target.block for target in self.decompositions[name].group.targets)

    @contextmanager
    def _at(self, shares: Mapping[str, float]) -> Iterator[None]:
        """These groups at these shares; what was in their places comes back in the end."""
        before: dict[str, nn.Module] = {}
        try:
            for name, share in shares.items():
                decomposition = self.decompositions[name]
                rank = candidate_rank(decomposition.group, share)
                factors = None if rank is None else decomposition.truncate(rank)
                for number, member in enumerate(decomposition.group.names):
                    before[member] = self.model.get_submodule(member)
                    if member in self.dense:
                        swap_(self.model, member, self.dense[member])
                    else:
                        self.dense[member] = before[member]
                    if factors is not None:
                        factorize_(self.model, member, factors.basis, factors.coefficients[number])
            yield
        finally:
            for member, module in before.items():
                swap_(self.model, member, module)
