"""The plan: which target gets which rank. Plain data that can be saved, edited by hand and replayed.

Nothing downstream looks at how a plan was made. A target that a plan does not name stays dense.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eckart import ledger
from eckart.errors import PlanError
from eckart.support.files import write_text
from eckart.support.not_finite import numbers, to_json
from eckart.types import Entry, Group, Target

FORMAT = "eckart-plan"
VERSION = 1


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
        if data.get("format") != FORMAT:
            raise PlanError(f"{source}: not a plan (its format is {data.get('format')!r}, not {FORMAT!r}).")
        if data.get("version") != VERSION:
            raise PlanError(
                f"{source}: plan version {data.get('version')!r}, but this eckart reads {VERSION}; "
                "use the eckart that wrote it, or write the plan again."
            )
        entries = tuple(_entry_from_dict(row, source) for row in data.get("entries", ()))
        return Plan(entries, data.get("asked", {}), data.get("reached", {}), data.get("made_by", {}))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_text(Path(path), to_json(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan that `save` or a person wrote."""
        path = Path(path)
        try:
            data = numbers(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise PlanError(f"{path}: no such plan file.") from None
        except (OSError, ValueError) as error:
            raise PlanError(f"{path}: cannot be read as a plan: {error}.") from None
        if not isinstance(data, dict):
            raise PlanError(f"{path}: not a plan (the top of the JSON is not an object).")
        return Plan.from_dict(data, str(path))


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
        group = Group(tuple(by_name[name] for name in entry.targets))
        _check_entry(group, entry)
        groups.append(group)
        entries.append(entry)
    for target in targets:
        if target.name not in seen:
            groups.append(Group((target,)))
            entries.append(Entry((target.name,), None))
    return groups, entries


def _check_entry(group: Group, entry: Entry) -> None:
    if len({target.in_features for target in group.targets}) > 1:
        raise PlanError(f"{entry.name}: the targets that share its basis have different input sizes.")
    if entry.rank is not None and not 1 <= entry.rank <= group.full_rank:
        raise PlanError(
            f"{entry.name}: rank {entry.rank} in the plan, but it must lie in [1, {group.full_rank}], "
            f"the full rank of a {group.out_features} x {group.in_features} matrix."
        )
    storage = ledger.storage_of(group, entry.storage)  # raises for an unknown one
    if entry.rank is None:
        if entry.kept:
            raise PlanError(f"{entry.name}: {entry.kept} preserved columns in the plan of a dense layer; write none.")
    elif refusal := storage.refusal(ledger.size_of(group, entry.rank, entry.kept)):
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
    if entry.kept is not None:
        row["kept"] = entry.kept
    return {**row, "details": dict(entry.details)} if entry.details else row


def _entry_from_dict(row: Any, source: str) -> Entry:
    if not isinstance(row, dict) or not row.get("targets"):
        raise PlanError(f"{source}: an entry without targets: {row!r}.")
    unknown = set(row) - {"targets", "rank", "storage", "kept", "details"}
    if unknown:
        raise PlanError(f"{source}: {row['targets'][0]}: unknown key {min(unknown)!r} in its entry.")
    rank = row.get("rank")
    if rank != "dense" and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise PlanError(f'{source}: {row["targets"][0]}: rank is {rank!r}, but it must be a whole number or "dense".')
    kept = row.get("kept")
    if kept is not None and (not isinstance(kept, int) or isinstance(kept, bool) or kept < 0):
        raise PlanError(
            f"{source}: {row['targets'][0]}: kept is {kept!r}, but it must be a number of columns, or absent."
        )
    details = row.get("details", {})
    if not isinstance(details, dict):
        raise PlanError(f"{source}: {row['targets'][0]}: details is {details!r}, but it must be an object.")
    return Entry(tuple(row["targets"]), None if rank == "dense" else rank, row.get("storage", "pair"), kept, details)
