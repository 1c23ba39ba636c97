"""What parts of a plan add to the KL divergence from the dense model, measured.

A part put into the dense model alone adds more than the same part put in last, since a model that is already wrong
cannot become as wrong again. The mean of the two is the two-point estimate of the part's Shapley value, its fair share
of what the whole plan costs.
"""

from collections.abc import Collection, Sequence

from torch import nn

from eckart.held_out import HeldOut
from eckart.probe import Put, in_place, swapped
from eckart.progress import Progress, silent, track
from eckart.types import Entry, Group

Part = Collection[str]  # names of groups


class PartProbe:
    """The cuts of a plan, `entries` of `groups`, put into a dense `model` part by part; the model stays as it was.

    Only the blocks from a part's first one on run, on what enters that block in the model without the part (with it,
    where it is taken out): for every block that is `[windows, length, width]`, kept while the parts are measured.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        entries: Sequence[Entry],
        put: Put,
        held_out: HeldOut,
        progress: Progress = silent,
    ) -> None:
        self.model, self.put, self.held_out, self.progress = model, put, held_out, progress
        self.cuts = {g.name: (g, e) for g, e in zip(groups, entries, strict=True) if e.rank is not None}

    def alone(self, parts: Sequence[Part]) -> list[float]:
        """The KL of each part put in alone, nats per token."""
        entering = self.held_out.entering_blocks()
        found = []
        for part in track(parts, "probe", len(parts), self.progress):
            first = self._first_block(part)
            with in_place(self.model, *self._cuts_of(part), self.put):
                found.append(self.held_out.kl(first, entering[first]))
        return found

    def last(self, parts: Sequence[Part]) -> list[float]:
        """What each part adds to all others, nats per token: may be negative."""
        dense = {name: self.model.get_submodule(name) for group, _ in self.cuts.values() for name in group.names}
        found = []
        with in_place(self.model, *self._cuts_of(self.cuts), self.put):
            whole, entering = self.held_out.kl(), self.held_out.entering_blocks()
            for part in track(parts, "probe", len(parts), self.progress):
                names = [name for group in self._cuts_of(part)[0] for name in group.names]
                first = self._first_block(part)
                with swapped(self.model, {name: dense[name] for name in names}):
                    found.append(whole - self.held_out.kl(first, entering[first]))
        return found

    def fair(self, parts: Sequence[Part]) -> list[float]:
        """The mean of both; a part that helps the others when it comes last counts as one that adds nothing there."""
        return [(a + max(b, 0.0)) / 2 for a, b in zip(self.alone(parts), self.last(parts), strict=True)]

    def _cuts_of(self, part: Part) -> tuple[list[Group], list[Entry]]:
        cuts = [self.cuts[name] for name in self.cuts if name in part]
        return [group for group, _ in cuts], [entry for _, entry in cuts]

    def _first_block(self, part: Part) -> int:
        return min((t.block for group in self._cuts_of(part)[0] for t in group.targets), default=0)
