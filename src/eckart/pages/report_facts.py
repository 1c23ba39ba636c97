"""What a checkpoint says of itself, gathered as plain data: everything on the page of a report but measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eckart import ledger
from eckart.checkpoints import checkpoint, fingerprints, spectra_file
from eckart.errors import CheckpointError
from eckart.model.discovery import Layout, discover, skipped_by_reason
from eckart.pages.facts_checked import check_ledger, check_plan, check_provenance
from eckart.plans.plan import Plan, resolve
from eckart.portable.hashes import PROVENANCE
from eckart.types import Entry, Group


def gather(folder: str | Path) -> dict[str, Any]:
    """Everything that the folder itself knows: plain data, no weight read.

    Raises `CheckpointError` when it is not a checkpoint with a plan, which is what a report is about.
    """
    folder = Path(folder)
    if not checkpoint.is_checkpoint(folder):
        raise CheckpointError(f"{folder}: not a checkpoint of eckart; a report is about what `eckart compress` wrote.")
    plan, provenance = checkpoint.read_plan(folder), checkpoint.read_provenance(folder)
    if plan is None:
        raise CheckpointError(f"{folder}: has no plan.json, so there is nothing to report.")
    check_plan(plan, folder / checkpoint.PLAN)
    check_provenance(provenance, folder / PROVENANCE)
    fingerprints.check_shown(folder, provenance.get("files") or {})
    layout = discover(checkpoint.skeleton(str(folder), dense=True))
    spectra = spectra_file.read(folder)
    groups, entries = resolve(plan, layout.targets)
    return {
        "folder": str(folder),
        "model": provenance.get("model", {}),
        "recipe": dict(plan.made_by),
        "asked": dict(plan.asked),
        "reached": dict(plan.reached),
        "ledger": check_ledger(provenance.get("ledger") or plan.reached, folder),
        "kl": provenance.get("kl"),
        "modules": modules(groups, entries, spectra),
        "spectra": spectra,
        "left": _left(layout, plan),
        "calibration": provenance.get("calibration"),
        "refinement": provenance.get("refinement", []),
        "command": provenance.get("command"),
        "versions": provenance.get("versions", {}),
        "files": provenance.get("files", {}),
    }


def summary(folder: str | Path) -> dict[str, Any]:
    """The short form for a table of several models: who made it, ledger, command."""
    folder = Path(folder)
    if not checkpoint.is_checkpoint(folder):
        raise CheckpointError(f"{folder}: not a checkpoint of eckart, which is what can be compared.")
    plan, provenance = checkpoint.read_plan(folder), checkpoint.read_provenance(folder)
    book = provenance.get("ledger")
    if book is None:
        raise CheckpointError(f"{folder}: its provenance.json has no ledger; compress it again.")
    if plan is not None:
        check_plan(plan, folder / checkpoint.PLAN)
    check_provenance(provenance, folder / PROVENANCE)
    fingerprints.check_shown(folder, provenance.get("files") or {})
    made_by = {} if plan is None else plan.made_by
    return {
        "recipe": made_by.get("name", "-"),
        "ledger": check_ledger(book, folder),
        "command": provenance.get("command"),
    }


def modules(
    groups: Sequence[Group], entries: Sequence[Entry], spectra: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for every target: where it is, what it was given, and what is known of it.

    A share counts a shared basis once: every member of the group has the share of the whole group.
    """
    by_name = {row["targets"][0]: row for row in spectra}
    rows = []
    for group, entry in zip(groups, entries, strict=True):
        share = ledger.entry_parameters(group, entry) / group.parameters
        loss = entry.details.get("predicted_loss")
        for target in group.targets:
            row = {
                "name": target.name,
                "block": target.block,
                "kind": target.kind,
                "out": target.out_features,
                "in": target.in_features,
                "rank": entry.rank,
                "full_rank": group.full_rank,
                "storage": "dense" if entry.is_dense else entry.storage,
                "kept": entry.kept or 0,
                "bits": entry.bits,
                "share": share,
                "group": 1 if group.own_bases else len(group.targets),
                "energy_effective_rank": by_name.get(entry.name, entry.details).get("energy_effective_rank"),
                "predicted_loss": None if loss is None else loss / len(group.targets),
                "measured_alone": _measured_alone(by_name.get(entry.name, {}).get("measured_kl"), share),
            }
            rows.append(row)
    return sorted(rows, key=lambda row: row["block"])


def _measured_alone(curve: dict[str, float] | None, share: float) -> float | None:
    """What the model lost when this group alone was cut to the measured share nearest to its own."""
    if not curve or share == 1:
        return None
    return curve[min(curve, key=lambda measured: abs(float(measured) - share))]


def _left(layout: Layout, plan: Plan) -> list[dict[str, Any]]:
    """What was never compressed, and how much of the model it is."""
    left = [{"reason": reason, "parameters": count} for reason, count in skipped_by_reason(layout).items()]
    planned = {name for entry in plan.entries for name in entry.targets}
    others = sum(target.parameters for target in layout.targets if target.name not in planned)
    return [*left, {"reason": "not in the plan", "parameters": others}] if others else left
