"""Change the storage of a saved model without compressing it again: pair, pivoted or dense."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from eckart import ledger, storages
from eckart.checkpoints import checkpoint, spectra_file
from eckart.errors import OptionError
from eckart.ledger import Ledger
from eckart.model.discovery import Layout, discover
from eckart.model.factorise import store_
from eckart.plans.plan import Plan, resolve
from eckart.portable import experts, hf
from eckart.portable.linear import shape_of
from eckart.progress import Progress, silent, track
from eckart.storages import Size
from eckart.support import files
from eckart.types import Entry


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the ledger now, how many layers changed, and those that could not, with the reason."""

    ledger: Ledger
    changed: int
    left: Mapping[str, str]


def convert(folder: str | Path, *, storage: str, out: str | Path, progress: Progress = silent) -> Conversion:
    """Save the checkpoint `folder` to `out` with its factorised layers in another storage.

    The matrices are the same to rounding in the stored dtype. Layers that share a basis, or have
    full rank, cannot be pivoted and stay as they are. Raises `UserError` for an unknown storage, a folder
    that is not a checkpoint, or an `out` that is taken.
    """
    possible = [*(candidate.name for candidate in storages.known() if candidate.from_plain_pairs), "dense"]
    if storage not in possible:
        raise OptionError(f"storage is {storage!r}, but must be {', '.join(possible)}.")
    files.check_new_folder(Path(out))
    model, tokenizer = checkpoint.load(folder), checkpoint.load_tokenizer(folder)
    specs, skeleton = hf.specs_of(model), hf.dense_skeleton(model)
    left = {} if storage == "dense" else _left(model, specs, storage)
    # A stack of experts stays what it is, or becomes dense.
    kept = left if storage == "dense" else {*left, *(n for n, s in specs.items() if s["storage"] == experts.STORAGE)}
    names = [n for n, spec in specs.items() if n not in kept and spec["storage"] != storage]
    if storage == "dense" and specs:
        model.dequantize()
    else:
        for name in track(names, "convert", len(names), progress):
            store_(model, name, storage)
    layout = discover(skeleton)
    plan, reached = _plan(checkpoint.read_plan(folder), model, layout)
    provenance = {**checkpoint.read_provenance(folder), "converted_to": storage, "ledger": reached.to_dict()}
    spectra = spectra_file.read(folder)
    checkpoint.save(model, out, tokenizer=tokenizer, plan=plan, provenance=provenance, spectra=spectra, source=folder)
    return Conversion(reached, len(names), left)


def _left(model: nn.Module, specs: hf.Specs, storage: str) -> dict[str, str]:
    """Layers that cannot be stored as asked, and why."""
    owners = [spec.get("basis_of", name) for name, spec in specs.items()]
    left: dict[str, str] = {}
    for name, spec in specs.items():
        if spec["storage"] == experts.STORAGE:
            left |= {} if spec["of"] == storage else {name: "is a stack of experts, which is only changed to dense"}
            continue
        if storages.find(spec["storage"]).packs:
            left[name] = "has few bits"
            continue
        members = owners.count(spec.get("basis_of", name))
        size = Size(*shape_of(model.get_submodule(name)), spec["rank"], spec.get("kept", 0), members)
        if refusal := storages.find(storage).refusal(size):
            left[name] = refusal
    return left


def _entry(names: tuple[str, ...], spec: Mapping[str, Any]) -> Entry:
    return Entry(names, spec.get("rank"), spec["storage"], bits=spec.get("bits"), group=spec.get("group"))


def _plan(plan: Plan | None, model: nn.Module, layout: Layout) -> tuple[Plan, Ledger]:
    """The plan with the storage that the model has now, or one read off the model; and its ledger."""
    specs = checkpoint.layer_specs(hf.specs_of(model))
    if plan is None:
        sharing: dict[str, list[str]] = {}
        for name, spec in specs.items():
            sharing.setdefault(spec.get("basis_of", name), []).append(name)
        plan = Plan(tuple(_entry(tuple(n), specs[o]) for o, n in sharing.items()))
    entries = [
        replace(entry, rank=None, storage="pair", bits=None, group=None)
        if entry.name not in specs
        else replace(entry, storage=specs[entry.name]["storage"])
        for entry in plan.entries
    ]
    changed = replace(plan, entries=tuple(entries))
    groups, resolved = resolve(changed, layout.targets)
    dtype = next(model.parameters()).dtype
    book = ledger.make_ledger(groups, resolved, layout.parameters, dtype.itemsize)
    return replace(changed, reached={**changed.reached, **book.to_dict()}), book
