"""How the experts of a layer are treated: whether they have one rank, and how far one borrows from its layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eckart.errors import OptionError
from eckart.model.experts import PRIOR
from eckart.plans.grouping import Grouping
from eckart.types import Group, Target


@dataclass(frozen=True)
class Experts:
    """The options of experts in a recipe.

    `ranks` "even": the experts of a layer and kind have one rank, each with a basis of its own, so that a layer
    computes two grouped products in the place of one. "free": every expert has the rank that the allocator gives it,
    and a layer computes two grouped products for each rank that occurs in it.

    `prior`: the Grams of an expert are taken as if it had also seen so many average tokens of its layer, in parts of
    the Gram's size (`eckart.statistics.routed`); 0 takes its own tokens alone.
    """

    ranks: Literal["even", "free"] = "even"
    prior: float = PRIOR

    def __post_init__(self) -> None:
        if not self.prior >= 0:
            raise OptionError(f"experts.prior is {self.prior:g}, but must not be negative.")

    def groups(self, targets: Sequence[Target], grouping: Grouping) -> list[Group]:
        """Put every target into one group: experts among themselves, all others as the grouping says.

        In model order of their first members. Raises `OptionError` when there is nothing to group.
        """
        others = [target for target in targets if target.expert is None]
        groups = grouping.groups(others) if others else []
        stacks: dict[tuple[int, str], list[Target]] = {}
        for target in targets:
            if target.expert is not None:
                stacks.setdefault((target.block, target.kind), []).append(target)
        for members in stacks.values():
            if self.ranks == "even" and len(members) > 1:
                groups.append(Group(tuple(members), own_bases=True))
            else:
                groups += [Group((member,)) for member in members]
        order = {target.name: number for number, target in enumerate(targets)}
        return sorted(groups, key=lambda group: order[group.name])
