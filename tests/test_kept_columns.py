"""Preserved columns through the stack: layer, ledger, plan, checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from eckart import ledger, storages
from eckart.checkpoints import checkpoint
from eckart.errors import PlanError
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_, store_
from eckart.plans.plan import Plan, resolve
from eckart.portable import hf
from eckart.portable.linear import empty_like, share_basis_
from eckart.storages.columns import KeptColumnsLinear
from eckart.storages.pair import FactorizedLinear
from eckart.support import dtypes
from eckart.testing import tiny_models
from eckart.types import Entry, Factors, Group, Target

INDEX = torch.tensor([1, 4, 11])


def make_factors(out_features: int = 10, rank: int = 4, in_features: int = 12) -> Factors:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, in_features - 3, generator=generator)
    coefficients = torch.randn(out_features, rank, generator=generator)
    return Factors(basis, (coefficients,), INDEX, (torch.randn(out_features, 3, generator=generator),))


def make_layer(dtype: torch.dtype = torch.float32) -> KeptColumnsLinear:
    model, factors = nn.Sequential(nn.Linear(12, 10, dtype=dtype)), make_factors()
    made = factorize_(model, "0", factors.basis, factors.coefficients[0], factors.kept_index, factors.kept[0])
    assert isinstance(made, KeptColumnsLinear)
    return made


def test_product_puts_every_column_in_its_place() -> None:
    factors = make_factors()
    assert torch.equal(factors.product()[:, INDEX], factors.kept[0])
    rest = [i for i in range(12) if i not in INDEX.tolist()]
    assert torch.equal(factors.product()[:, rest], factors.coefficients[0] @ factors.basis)


def test_forward_is_the_product() -> None:
    layer, x = make_layer(), torch.randn(2, 3, 12)
    torch.testing.assert_close(layer.weight, make_factors().product())
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_autocast_and_a_wrapped_strip_take_the_general_path() -> None:
    layer, x = make_layer(), torch.randn(3, 12)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.2)
    layer.kept = nn.Sequential(layer.kept)  # type: ignore[assignment]
    torch.testing.assert_close(layer(x), expected)


def test_compiles_whole() -> None:
    layer, x = make_layer(), torch.randn(3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_gradients_reach_every_part() -> None:
    layer = make_layer().double()
    assert torch.autograd.gradcheck(layer, (torch.randn(3, 12, dtype=torch.float64, requires_grad=True),))
    layer(torch.randn(3, 12).double()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_indices_alone(dtype: torch.dtype) -> None:
    layer = make_layer()
    before = layer.column_order.clone()
    layer.to(dtype)
    assert layer.column_order.dtype == torch.int32
    assert torch.equal(layer.column_order, before)
    assert layer(torch.randn(2, 12, dtype=dtype)).dtype == dtype


def test_members_of_a_group_share_the_basis() -> None:
    one, other = make_layer(), make_layer()
    share_basis_(one, other)
    assert one.basis.weight is other.basis.weight
    with pytest.raises(ValueError, match="cannot serve"):
        share_basis_(one, FactorizedLinear(12, 10, 4))


def test_spec_and_empty_like_are_inverse() -> None:
    layer = make_layer()
    assert layer.spec() == {"storage": "columns", "rank": 4, "kept": 3}
    again = empty_like(nn.Linear(12, 10), layer.spec())
    assert again.spec() == layer.spec()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}
    assert "kept=3" in repr(layer)


@pytest.mark.parametrize("kept", [0, 9, True, "3", None])
def test_a_number_of_columns_that_cannot_be_is_refused(kept: object) -> None:
    with pytest.raises(ValueError, match=r"kept is .*, but it must be a whole number in \[1, 8\]"):
        empty_like(nn.Linear(12, 10), {"storage": "columns", "rank": 4, "kept": kept})


@pytest.mark.parametrize("index", [None, torch.tensor([4, 1, 11]), torch.tensor([1, 1, 4]), torch.tensor([1, 4])])
def test_indices_that_do_not_fit_are_refused(index: torch.Tensor | None) -> None:
    factors = make_factors()
    with pytest.raises(ValueError, match="rising positions"):
        factorize_(
            nn.Sequential(nn.Linear(12, 10)), "0", factors.basis, factors.coefficients[0], index, factors.kept[0]
        )


def test_ledger_counts_what_the_layer_stores() -> None:
    group = Group((Target("0", 0, "0", 10, 12, True),))
    layer = make_layer()
    stored = sum(p.numel() for p in layer.parameters()) - layer.bias.numel()
    assert ledger.parameters(group, 4, "columns", 3) == stored == 10 * 3 + 4 * (10 + 12 - 3)
    assert ledger.index_bytes(group, 4, "columns", 3) == layer.column_order.nbytes
    assert ledger.parameters(group, 4, "columns", None) == ledger.parameters(group, 4)
    assert ledger.index_bytes(group, 4) == ledger.index_bytes(group, None) == 0
    made = ledger.make_ledger([group], [Entry(("0",), 4, "columns", 3)], 1000, 2)
    assert made.target_parameters_kept == stored
    assert made.model_bytes_kept == 2 * (1000 - 120 + stored) + 48


def test_plan_with_columns_passes_through_json(tmp_path: Path) -> None:
    targets = [Target(f"{i}", i, "0", 10, 12, False) for i in range(3)]
    plan = Plan((Entry(("0",), 4, "columns", 3), Entry(("1",), 4, "pair", 0), Entry(("2",), 4)))
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert resolve(read, targets)[1] == list(plan.entries)
    assert "kept" not in json.loads((tmp_path / "plan.json").read_text())["entries"][2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"storage": "columns", "kept": 9}, "9 preserved columns in the plan cannot .* has room for at most 8 "),
        ({"kept": 1}, "1 preserved columns in the plan cannot have storage 'pair', since it has preserved"),
        ({"storage": "columns", "kept": -1}, "kept is -1"),
        ({"storage": "columns", "kept": True}, "kept is True"),
    ],
)
def test_plans_that_cannot_be_are_refused(row: dict[str, object], words: str) -> None:
    data = {"format": "eckart-plan", "version": 1, "entries": [{"targets": ["0"], "rank": 4, **row}]}
    with pytest.raises(PlanError, match=words):
        resolve(Plan.from_dict(data), [Target("0", 0, "0", 10, 12, False)])


@pytest.mark.parametrize("family", ["llama-bias", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_is_the_same_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models()[family]()
    entries = []
    for target in discover(model).targets:
        factors = make_factors(target.out_features, 4, target.in_features)
        factorize_(model, target.name, factors.basis, factors.coefficients[0], INDEX, factors.kept[0])
        entries.append(Entry((target.name,), 4, "columns", 3))
    dtypes.cast_(model, dtype)
    checkpoint.save(model, tmp_path / "saved", plan=Plan(tuple(entries)))
    again = checkpoint.load(tmp_path / "saved")
    assert hf.specs_of(again) == hf.specs_of(model)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in state)
    ids = torch.randint(4, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_another_number_of_columns_in_the_plan_is_refused(tmp_path: Path) -> None:
    model = tiny_models()["llama"]()
    name = discover(model).targets[0].name
    factors = make_factors(32, 4, 32)
    factorize_(model, name, factors.basis, factors.coefficients[0], INDEX, factors.kept[0])
    with pytest.raises(PlanError, match=r"2 columns kept in the plan, but .* 3 columns kept in the model"):
        checkpoint.save(model, tmp_path / "saved", plan=Plan((Entry((name,), 4, "columns", 2),)))


def test_another_storage_is_not_given_to_columns_nor_columns_to_a_pair() -> None:
    model = tiny_models()["llama"]()
    name, factors = "model.layers.0.self_attn.q_proj", make_factors(32, 4, 32)
    factorize_(model, name, factors.basis, factors.coefficients[0], INDEX, factors.kept[0])
    words = "preserved columns have a storage of their own, which is not changed"
    with pytest.raises(ValueError, match=rf"^{name}: {words}\.$"):
        store_(model, name, "pair")
    with pytest.raises(ValueError, match=rf"^{words}\.$"):
        storages.find("columns").of_pair(storages.Pair(torch.eye(2, 4), torch.eye(3, 2), None))


def test_a_dense_layer_keeps_no_columns() -> None:
    with pytest.raises(PlanError, match=r"^0: 2 preserved columns in the plan of a dense layer; write none\.$"):
        resolve(Plan((Entry(("0",), None, "columns", 2),)), [Target("0", 0, "0", 10, 12, False)])
