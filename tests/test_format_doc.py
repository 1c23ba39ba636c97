"""docs/format.md says what is true: its example is a checkpoint, written here by its words alone."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from eckart.checkpoints import checkpoint
from eckart.model.discovery import discover
from eckart.portable import hf
from eckart.storages.columns import KeptColumnsLinear
from eckart.storages.pair import FactorizedLinear
from eckart.storages.pivoted import PivotedLinear
from eckart.testing import tiny_models

PAGE = (Path(__file__).parent.parent / "docs/format.md").read_text(encoding="utf-8")


def example() -> dict[str, Any]:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    data: dict[str, Any] = json.loads(block)
    return data


def write_by_the_page(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint made without eckart's writer; returns the product of each factorised layer."""
    model = tiny_models()["llama-bias"]()
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    quantization, products = example(), {}
    bases: dict[str, torch.Tensor] = {}
    for name, spec in quantization["modules"].items():
        out_features, in_features = state.pop(f"{name}.weight").shape
        if spec["storage"] == "pivoted":
            products[name] = write_pivoted(state, name, spec, out_features, in_features)
            continue
        owner, kept = spec.get("basis_of", name), spec.get("kept", 0)
        bases.setdefault(owner, torch.randn(spec["rank"], in_features - kept))
        coefficients = torch.randn(out_features, spec["rank"])
        state[f"{owner}.basis.weight"] = bases[owner]
        state[f"{name}.coefficients.weight"] = coefficients
        if f"{name}.bias" in state:
            state[f"{name}.coefficients.bias"] = state.pop(f"{name}.bias")
        products[name] = coefficients @ bases[owner]
        if spec["storage"] == "columns":
            products[name] = write_columns(state, name, products[name], kept)
    state[f"{min(quantization['modules'])}.weight"] = torch.zeros(0)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return products


def write_columns(state: dict[str, torch.Tensor], name: str, rest: torch.Tensor, kept: int) -> torch.Tensor:
    """Keep every second of the first inputs; returns the layer's whole weight, `[out, in]`."""
    in_features = rest.shape[1] + kept
    kept_index = torch.arange(kept) * 2
    rest_index = torch.tensor([i for i in range(in_features) if i not in kept_index.tolist()])
    state[f"{name}.kept.weight"] = torch.randn(len(rest), kept)
    state[f"{name}.column_order"] = torch.cat([rest_index, kept_index]).int()
    whole = torch.empty(len(rest), in_features)
    whole[:, rest_index], whole[:, kept_index] = rest, state[f"{name}.kept.weight"]
    return whole


def write_pivoted(
    state: dict[str, torch.Tensor], name: str, spec: dict[str, Any], out_features: int, in_features: int
) -> torch.Tensor:
    """Random numbers in the shapes of the table; the layer's whole weight from the words under it, column by column."""
    rank, rows = spec["rank"], spec["pivots"] == "rows"
    basis = torch.randn(rank, in_features if rows else in_features - rank)
    coefficients = torch.randn(out_features - rank if rows else out_features, rank)
    index = torch.randperm(out_features if rows else in_features)
    state[f"{name}.basis.weight"], state[f"{name}.coefficients.weight"] = basis, coefficients
    state[f"{name}.index"] = index.int()
    columns = []
    for x in torch.eye(in_features):
        if rows:
            p = basis @ x
            pq = torch.cat([p, coefficients @ p])
            columns.append(torch.stack([pq[i] for i in index]))
        else:
            ab = torch.stack([x[i] for i in index])
            columns.append(coefficients @ (ab[:rank] + basis @ ab[rank:]))
    return torch.stack(columns, 1)


def test_the_example_loads_as_a_checkpoint(tmp_path: Path) -> None:
    products = write_by_the_page(tmp_path)
    model = checkpoint.load(tmp_path)
    assert hf.specs_of(model) == example()["modules"]
    for name, product in products.items():
        torch.testing.assert_close(model.get_submodule(name).weight, product)


def test_the_writer_keeps_to_the_page(tmp_path: Path) -> None:
    """Saved again by eckart, the example has the same configuration and the same tensors."""
    write_by_the_page(tmp_path / "page")
    checkpoint.save(checkpoint.load(tmp_path / "page"), tmp_path / "ours")
    page, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("page", "ours"))
    assert page.keys() == ours.keys()
    assert all(torch.equal(page[key], ours[key]) for key in page)
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["quantization_config"] == example()


def test_the_page_names_every_factorised_key() -> None:
    keys = [*PivotedLinear(4, 4, 2, bias=True).state_dict(), *FactorizedLinear(4, 4, 2, bias=True).state_dict()]
    keys += [*KeptColumnsLinear(4, 4, 2, 1, bias=True).state_dict()]
    assert {f"<layer>.{key}" for key in keys} <= set(re.findall(r"`(<layer>[\w.]+)`", PAGE))
    assert f"version {hf.FORMAT_VERSION}" in PAGE.splitlines()[0]


def test_the_page_names_every_file(tmp_path: Path) -> None:
    from eckart.plans.plan import Plan
    from eckart.types import Entry

    model = tiny_models()["llama"]()
    plan = Plan((Entry((discover(model).targets[0].name,), None),))
    checkpoint.save(model, tmp_path / "saved", plan=plan)
    assert all(f"`{path.name}`" in PAGE for path in (tmp_path / "saved").iterdir())
    assert plan.to_dict().keys() == json.loads(re.findall(r'`(\{"format": .*?\})`', PAGE)[0].replace("...", "")).keys()
