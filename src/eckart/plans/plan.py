"""The plan: which target gets which rank. Plain data that can be saved, edited by hand and replayed.

Nothing downstream looks at how a plan was made. A target that a plan does not name stays dense.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from eckart import ledger, storages
from eckart.errors import PlanError
from eckart.storages._packed_matrix import GROUPS, WIDTHS
from eckart.support import reading
from eckart.support.escaping import plain
from eckart.support.files import write_text
from eckart.support.not_finite import to_json
from eckart.types import Entry, Group, Target

FORMAT = "eckart-plan"
VERSION = 1
LARGEST_RANK = 2**31 - 1  # of a plan in a file; no matrix comes near it


@dataclass(frozen=True)
class Plan:
    """Entries, and where they came from.

    `asked` is the budget (`{"keep": 0.8, ...}`), `reached` the ledger's answer, `made_by` the recipe
    or allocator with its options; all three are for people and reports, never for the code that
    carries the plan out.
    """

    entries: tuple[Entry, ...]
    asked: Mapping[str, Any] = field(default_factory=dict)
    reached: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "asked": dict(self.asked),
            "reached": dict(self.reached),
            "made_by": dict(self.made_by),
            "entries": [_entry_to_dict(entry) for entry in self.entries],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "plan") -> "Plan":
        """Read the JSON form; raises `PlanError` that names the entry and the rule it breaks."""
        head = reading.checked(data, _Head, PlanError, source)
        if head.format != FORMAT:
            found = reading.shown(head.format)
            raise PlanError(f"{plain(source, 1000)}: not a plan (its format is {found}, not {FORMAT!r}).")
        if head.version != VERSION:
            raise PlanError(
                f"{plain(source, 1000)}: plan version {reading.shown(head.version)}, but this eckart reads {VERSION}; "
                "use the eckart that wrote it, or write the plan again."
            )
        read = reading.checked(data, _Plan, PlanError, source)
        return Plan(tuple(row.entry() for row in read.entries), read.asked, read.reached, read.made_by)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(Path(path), to_json(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan that `save` or a person wrote."""
        return Plan.from_dict(reading.read_json(Path(path), PlanError, "plan file"), str(path))


class _Head(msgspec.Struct):
    """What says whether a file is a plan that we read."""

    format: Any = None
    version: Any = None


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    """An entry as a file has it."""

    targets: list[str]
    rank: Any
    storage: str = "pair"
    kept: reading.Count | None = None
    own_bases: bool = False
    details: dict[str, Any] = {}
    bits: reading.Count | None = None
    group: reading.Count | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets is [], but an entry must name at least one")
        for name in self.targets:
            if not _is_name(name):
                raise ValueError(f"targets has {reading.shown(name)}, which cannot be the name of a layer")
        if self.rank != "dense" and (type(self.rank) is not int or not 1 <= self.rank <= LARGEST_RANK):
            rank = reading.shown(self.rank)
            raise ValueError(f'rank is {rank}, but it must be a whole number from 1 on, or "dense"')
        if self.storage not in storages.names():
            known = ", ".join(storages.names())
            raise ValueError(f"storage is {reading.shown(self.storage)}, but this eckart knows {known}")
        if storages.find(self.storage).packs:
            for name, found, possible in (("bits", self.bits, WIDTHS), ("group", self.group, GROUPS)):
                if found not in possible:
                    allowed = ", ".join(map(str, possible))
                    raise ValueError(
                        f"{name} is {reading.shown(found)}, but storage {self.storage!r} needs one of {allowed}"
                    )
        elif self.bits is not None or self.group is not None:
            raise ValueError(f"bits and group stand beside storage {self.storage!r}, which has neither; leave them out")

    def entry(self) -> Entry:
        rank = None if self.rank == "dense" else self.rank
        return Entry(
            tuple(self.targets), rank, self.storage, self.kept, self.details,
            own_bases=self.own_bases, bits=self.bits, group=self.group,
        )  # fmt: skip


class _Plan(msgspec.Struct):
    """A plan as a file has it; but for the entries, nothing that the code which carries it out looks at."""

    entries: list[_Row] = []
    asked: dict[str, Any] = {}
    reached: dict[str, Any] = {}
    made_by: dict[str, Any] = {}


def _is_name(name: str) -> bool:
    """True for what can be the dotted name of a module; one that goes into messages, pages and names of files."""
    plain_text = name.isprintable() and not any(c in name for c in " /\\")
    return plain_text and len(name) <= 300 and all(name.split("."))


def resolve(plan: Plan, targets: Sequence[Target]) -> tuple[list[Group], list[Entry]]:
    """Match a plan with a model: the groups it forms and one entry for each.

    Targets that the plan does not name come back dense, each in a group of its own. Raises
    `PlanError` for an unknown or repeated target, a rank outside `[1, full rank]`, an unknown
    storage, more preserved columns than fit, or a shared basis over different input sizes.
    """
    by_name = {target.name: target for target in targets}
    groups, entries, seen = [], [], set()
    for entry in plan.entries:
        for name in entry.targets:
            if name not in by_name:
                raise PlanError(f"plan names {name!r}, which is not a target of this model{_near(name, by_name)}.")
            if name in seen:
                raise PlanError(f"plan names {name!r} twice; each target may appear once.")
            seen.add(name)
        group = Group(tuple(by_name[name] for name in entry.targets), entry.own_bases)
        _check_entry(group, entry)
        groups.append(group)
        entries.append(entry)
    _check_stacks(groups, entries)
    for target in targets:
        if target.name not in seen:
            groups.append(Group((target,)))
            entries.append(Entry((target.name,), None))
    return groups, entries


def _check_stacks(groups: Sequence[Group], entries: Sequence[Entry]) -> None:
    """The experts of a stack have one storage, since their factors are stacked."""
    storages_of: dict[tuple[int, str], str] = {}
    for group, entry in zip(groups, entries, strict=True):
        for target in group.targets if entry.rank is not None else ():
            known = storages_of.setdefault((target.block, target.kind), entry.storage)
            if target.expert is not None and known != entry.storage:
                raise PlanError(
                    f"{target.name}: storage {entry.storage!r} in the plan, but other experts of its stack have "
                    f"{known!r}; give all of them one."
                )


def _check_entry(group: Group, entry: Entry) -> None:
    if len({target.in_features for target in group.targets}) > 1:
        raise PlanError(f"{entry.name}: the targets that share its basis have different input sizes.")
    if entry.own_bases and len({target.out_features for target in group.targets}) > 1:
        raise PlanError(f"{entry.name}: the targets that share its rank have different output sizes.")
    if entry.rank is not None and not 1 <= entry.rank <= group.full_rank:
        raise PlanError(
            f"{entry.name}: rank {entry.rank} in the plan, but it must lie in [1, {group.full_rank}], "
            f"the full rank of a {group.out_features} x {group.in_features} matrix."
        )
    storage = ledger.storage_of(group, entry.storage)  # raises for an unknown one
    if entry.is_dense:
        if entry.kept:
            raise PlanError(f"{entry.name}: {entry.kept} preserved columns in the plan of a dense layer; write none.")
    elif refusal := ledger.refusal(group, entry.rank or 0, entry.storage, entry.kept, entry.bits, entry.group):
        if storage.packs:
            rank = "dense" if entry.rank is None else entry.rank
            raise PlanError(
                f"{entry.name}: rank {rank} in the plan cannot have storage {entry.storage!r}, since it {refusal}; "
                "write another storage or rank."
            )
        raise PlanError(
            f"{entry.name}: rank {entry.rank} of {group.full_rank}, {entry.kept or 0} preserved columns in the plan "
            f"cannot have storage {entry.storage!r}, since it {refusal}; write another storage or rank, or dense."
        )


def _near(name: str, targets: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, targets, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; `eckart inspect` lists the targets"


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    rank = "dense" if entry.rank is None else entry.rank
    row: dict[str, Any] = {"targets": list(entry.targets), "rank": rank, "storage": entry.storage}
    if entry.bits is not None:
        row |= {"bits": entry.bits, "group": entry.group}
    if entry.kept is not None:
        row["kept"] = entry.kept
    if entry.own_bases:
        row["own_bases"] = True
    return {**row, "details": dict(entry.details)} if entry.details else row
