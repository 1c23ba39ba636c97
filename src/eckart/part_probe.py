"""What parts of a plan cost in KL divergence from the dense model, each measured alone."""

from collections.abc import Collection, Sequence

from torch import nn

from eckart.held_out import HeldOut
from eckart.probe import Put, in_place
from eckart.progress import Progress, silent, track
from eckart.types import Entry, Group

Part = Collection[str]  # names of groups


def measure_parts(
    model: nn.Module,
    groups: Sequence[Group],
    entries: Sequence[Entry],
    put: Put,
    held_out: HeldOut,
    parts: Sequence[Part],
    progress: Progress = silent,
) -> list[float]:
    """The KL in nats per token of the dense `model` with the cuts of each part in place; the model stays as it was.

    `entries` of `groups` are the plan. Only the blocks from a part's first one on run, on what enters that block in
    the dense model: for every block that is `[windows, length, width]`, kept while parts are measured.
    """
    entering = held_out.entering_blocks()
    found = []
    for part in track(parts, "probe", len(parts), progress):
        cuts = [(g, e) for g, e in zip(groups, entries, strict=True) if g.name in part and e.rank is not None]
        first = min((target.block for group, _ in cuts for target in group.targets), default=0)
        with in_place(model, [group for group, _ in cuts], [entry for _, entry in cuts], put):
            found.append(held_out.kl(first, entering[first]))
    return found
