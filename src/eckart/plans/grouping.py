"""Grouping: which targets are factorised side by side and share one basis (Basis Sharing, arXiv 2410.03765).

A group is a run of blocks' targets of one kind. The papers group the linears that read the block's
normalised input (q, k, v, gate, up) and leave private those that write to the residual stream (o,
down), which grouping hurts. Nothing in a matrix tells the two apart, so kinds are named by shell
patterns on the attribute names that decoders use for these roles, fused projections included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from eckart.errors import OptionError
from eckart.types import Group, Target

QUERY, KEY, VALUE = "*q_proj", "*k_proj", "*v_proj"
FUSED_ATTENTION = ("*qkv_proj", "*query_key_value", "*c_attn", "*Wqkv")
READERS = (QUERY, KEY, VALUE, *FUSED_ATTENTION, "*gate_proj", "*up_proj", "*gate_up_proj", "*fc1", "*c_fc", "*h_to_4h")


@dataclass(frozen=True)
class Grouping:
    """The grouping of a recipe.

    `size` is the number n of consecutive members of a group; 1 shares nothing. "auto" is D-Rank's
    choice: 2 for multi-head attention, 1 where queries are grouped. `kinds` are shell patterns of
    the kinds to group; all others stay private.
    """

    size: int | str = 1
    kinds: tuple[str, ...] = READERS

    def __post_init__(self) -> None:
        if self.size != "auto" and (not isinstance(self.size, int) or self.size < 1):
            raise OptionError(f'grouping.size is {self.size!r}, but must be a whole number from 1 on, or "auto".')

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        """Put every target into one group. Raises `OptionError` when there is nothing to group."""
        size = auto_size(targets) if isinstance(self.size, str) else self.size
        return make_groups(targets, size, self.kinds)


def make_groups(targets: Sequence[Target], size: int, kinds: Sequence[str]) -> list[Group]:
    """Groups of `size` consecutive targets of one kind, in the model order of their first members.

    `kinds` are shell patterns; a target of another kind is a group of its own. A group ends early at
    the last target and where the shape changes. Raises `OptionError` when nothing is to be grouped.
    """
    if size == 1:
        return [Group((target,)) for target in targets]
    if not any(matches(target.kind, kinds) for target in targets):
        present = ", ".join(dict.fromkeys(target.kind for target in targets))
        raise OptionError(
            f"grouping.kinds is {','.join(kinds)}, which matches none of {present}; name the kinds to group "
            "with grouping.kinds, or set grouping.size to 1."
        )
    groups: list[list[Target]] = []
    open_groups: dict[str, list[Target]] = {}
    for target in targets:
        mates = open_groups.get(target.kind)
        if mates is not None and len(mates) < size and _same_shape(mates[0], target):
            mates.append(target)
            continue
        groups.append([target])
        if matches(target.kind, kinds):
            open_groups[target.kind] = groups[-1]
    return [Group(tuple(members)) for members in groups]


def auto_size(targets: Sequence[Target]) -> int:
    """D-Rank's group size: 2 for multi-head attention, 1 for grouped queries."""
    return 2 if is_multi_head(targets) else 1


def is_multi_head(targets: Sequence[Target]) -> bool:
    """Whether all attention among the targets gives every query head its own keys, told by shapes.

    Keys as wide as queries, or a fused projection three times as wide as its input, are multi-head.
    """
    widths: dict[tuple[int, str], dict[str, int]] = {}
    for target in targets:
        parent = target.kind.rpartition(".")[0]
        for role in (QUERY, KEY, *FUSED_ATTENTION):
            if fnmatchcase(target.kind, role) and (
                role in (QUERY, KEY) or target.out_features == 3 * target.in_features
            ):
                widths.setdefault((target.block, parent), {})[role] = target.out_features
    multi_head = [
        w for w in widths.values() if set(w) & set(FUSED_ATTENTION) or (QUERY in w and w[QUERY] == w.get(KEY))
    ]
    return bool(multi_head) and len(multi_head) == len(widths)


def matches(kind: str, patterns: Sequence[str]) -> bool:
    """True if a kind matches one of the shell patterns."""
    return any(fnmatchcase(kind, pattern) for pattern in patterns)


def _same_shape(one: Target, other: Target) -> bool:
    return (one.out_features, one.in_features) == (other.out_features, other.in_features)
