"""What is kept for a later run is found again by the same call alone: every argument is changed in turn."""

import inspect
import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from eckart.factorizers.svd import SVD
from eckart.measuring import sensitivity
from eckart.measuring.probes import SlicingProbe
from eckart.measuring.sensitivity import measure_curves
from eckart.model.discovery import discover
from eckart.planning.decomposed import decompose
from eckart.plans import Plan
from eckart.refiners._block_work import BlockWork
from eckart.refiners.base import Refinement
from eckart.support.work import Journal, Key, WorkFolder
from eckart.tiny import tiny_models, tiny_tokenizer
from eckart.types import Entry, Group

WINDOWS = torch.randint(4, 99, (3, 12), generator=torch.Generator().manual_seed(0))


def test_a_key_hashes_all_that_it_is_given():
    base: dict[str, Any] = {"a": 1, "b": [1.5, "x", None], "t": torch.zeros(3), "m": torch.nn.Linear(2, 2)}
    key = Key("work", **base).digest
    assert key == Key("work", **base).digest
    changed: list[dict[str, Any]] = [
        {"a": 2}, {"a": 1.5}, {"b": [1.5, "x"]}, {"b": [1.5, "y", None]}, {"t": torch.ones(3)},
        {"t": torch.zeros(3, 1)},
        {"t": torch.zeros(3, dtype=torch.float64)}, {"m": torch.nn.Linear(2, 2)}, {"c": 0}, {"t": [torch.zeros(3)]},
    ]  # fmt: skip
    assert len({key, *(Key("work", **{**base, **change}).digest for change in changed)}) == 1 + len(changed)
    assert Key("other", **base).name != Key("work", **base).name
    with pytest.raises(TypeError, match="object cannot be part of a key"):
        Key("work", a=object()).digest  # noqa: B018


def test_facts_are_json():
    key = Key("work", a=(1, 2), t=torch.zeros(2), names={"b", "a"})
    assert json.loads(json.dumps(key.facts)) == key.facts
    assert key.facts["names"] == ["a", "b"]


def other_of(value: Any) -> Any:
    """A value of the same kind that is not equal."""
    if isinstance(value, torch.Tensor):
        return value + 1
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, bool) or value is None:
        return WINDOWS if value is None else not value
    if isinstance(value, int | float):
        return value / 2
    raise AssertionError(f"no other value known for {value!r}")


def test_measured_curves_depend_on_every_argument(tmp_path, monkeypatch):
    """All parameters of `measure_curves` but these: what is measured of it, and who listens."""
    free = {"work", "progress", "only", "shares", "cut", "layout", "groups"}  # `cut` is what `depends` says
    seen: list[Key] = []
    monkeypatch.setattr(sensitivity, "Journal", lambda work, key: seen.append(key) or _stop())

    class Stop(Exception):
        pass

    def _stop() -> None:
        raise Stop

    model = tiny_models()["llama"]()
    layout = discover(model)
    groups = [Group((target,)) for target in layout.targets]
    base: dict[str, Any] = {
        "model": model, "layout": layout, "groups": groups, "cut": None, "windows": WINDOWS, "target": 0.8,
        "work": tmp_path, "depends": {"factorizer": "svd"}, "shares": (0.5, 1.0), "storage": "pair",
    }  # fmt: skip

    def digest(**changes: Any) -> str:
        with pytest.raises(Stop):
            measure_curves(**{**base, **changes})
        return seen[-1].digest

    assert set(inspect.signature(measure_curves).parameters) == {*base, *free}
    other_model = tiny_models()["llama"]()
    with torch.no_grad():
        other_model.lm_head.weight[0, 0] += 1
    changed = {name: other_of(base[name]) for name in ("windows", "target", "storage")}
    found = {name: digest(**{name: value}) for name, value in changed.items()}
    found |= {"model": digest(model=other_model), "depends": digest(depends={"factorizer": "asvd"})}
    found |= {"groups": digest(groups=groups[1:]), "layout": digest(layout=replace(layout, blocks="other"))}
    assert digest() == digest(shares=(0.1,))  # one journal holds all shares
    assert len({digest(), *found.values()}) == 1 + len(found), found


def test_blocks_depend_on_every_field_of_a_refinement(tmp_path):
    free = {"progress", "notes", "work", "tokenizer"}
    model = tiny_models()["llama"]()
    layout = discover(model)
    dense = {"model.layers.0.mlp.up_proj": torch.zeros(2, 3)}
    work = Refinement(model, layout, Plan((Entry(("a",), 3),)), dense, WINDOWS, work=tmp_path, unseen=WINDOWS + 1)

    def name(work: Refinement, refiner: str = "r", options: Any = None) -> str:
        folder = BlockWork(work, refiner, options or {"steps": 1}).folder.folder
        assert folder is not None
        return folder.name

    other = tiny_models()["llama"]()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    changed: dict[str, Any] = {
        "model": other,
        "layout": replace(layout, blocks="other"),
        "plan": Plan((Entry(("a",), 4),)),
        "dense_weights": {"model.layers.0.mlp.up_proj": torch.ones(2, 3)},
        "windows": WINDOWS + 2,
        "unseen": WINDOWS + 3,
    }
    assert {*changed, *free} == {field.name for field in fields(Refinement)}
    found = [name(replace(work, **{key: value})) for key, value in changed.items()]
    found += [name(work, "other"), name(work, options={"steps": 2}), name(replace(work, unseen=None))]
    assert len({name(work), *found}) == 1 + len(found)


def test_a_candidate_is_told_apart_by_all_that_its_entries_say(tmp_path):
    model = tiny_models()["llama"]()
    layout = discover(model)
    group = Group((layout.targets[0],))
    made = decompose(model, layout, [group], SVD(), None)
    folder = WorkFolder(tmp_path, Key("probe"))
    probe = SlicingProbe(model, [group], made.cut, WINDOWS, WINDOWS, folder)
    base = Entry(group.names, 3)
    changes = ({}, {"rank": 4}, {"storage": "pivoted"}, {"kept": 0}, {"rank": None})
    entries = [replace(base, **change) for change in changes]
    for entry in entries:
        probe([entry])
        probe([entry], held_out=True)
    assert len(probe.losses) == 2 * len(entries)


def test_journals_of_other_keys_are_other_files(tmp_path):
    first = Journal(tmp_path, Key("sensitivity", windows=WINDOWS))
    first.add({"kl": 1.0})
    assert Journal(tmp_path, Key("sensitivity", windows=WINDOWS)).rows == [{"kl": 1.0}]
    assert Journal(tmp_path, Key("sensitivity", windows=WINDOWS + 1)).rows == []


def test_a_tokenizer_is_no_part_of_a_key():
    """It writes text, which is."""
    with pytest.raises(TypeError):
        Key("work", tokenizer=tiny_tokenizer()).digest  # noqa: B018
