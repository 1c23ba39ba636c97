"""Pivoted storage through the stack: layer, ledger, plan, pipeline, checkpoint, conversion."""

import copy

import pytest
import torch
from torch import nn

import eckart
from eckart import ledger
from eckart.checkpoints import checkpoint
from eckart.errors import OptionError, OutputError, PlanError
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_, store_
from eckart.plans.plan import Plan, resolve
from eckart.portable import hf
from eckart.portable.linear import empty_like, is_factorized, share_basis_
from eckart.storages.pivoted import PivotedLinear
from eckart.testing import tiny_models
from eckart.types import Entry, Group, Target

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIDES = ["rows", "columns"]
FAMILIES = sorted(tiny_models())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(pivots="rows", bias=True, dtype=torch.float32):
    """A pivoted layer 12 -> 10 of rank 4 and the dense weight and bias that it stands for."""
    model = nn.Sequential(nn.Linear(12, 10, bias=bias, dtype=dtype))
    basis, coefficients = normal(4, 12), torch.linalg.qr(normal(10, 4, seed=1)).Q
    pair = factorize_(model, "0", basis, coefficients)
    weight, bias = (pair.coefficients.weight.double() @ pair.basis.weight.double()).detach(), pair.bias
    return store_(model, "0", "pivoted", pivots=pivots), weight, bias


def pivot_all_(model):
    """Store every pair below full rank pivoted; the names of those layers."""
    names = [n for n, s in hf.specs_of(model).items() if s["rank"] < min(model.get_submodule(n).weight.shape)]
    for name in names:
        store_(model, name, "pivoted")
    return names


@pytest.mark.parametrize("pivots", SIDES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_product(pivots, bias, dtype):
    layer, weight, b = make_layer(pivots, bias, dtype)
    x = normal(2, 3, 12).to(dtype)
    expected = nn.functional.linear(x.double(), weight, None if b is None else b.double())
    assert isinstance(layer, PivotedLinear)
    assert layer(x).dtype == dtype
    close = {"rtol": 0, "atol": 12 * torch.finfo(dtype).eps * float(expected.detach().abs().max())}
    torch.testing.assert_close(layer(x).double(), expected, **close)
    torch.testing.assert_close(layer.weight.double(), weight, **close)
    assert sum(p.numel() for n, p in layer.named_parameters() if n != "bias") == 4 * (12 + 10 - 4)


@pytest.mark.parametrize("pivots", SIDES)
def test_compiles_whole(pivots):
    layer, x = make_layer(pivots)[0], torch.randn(3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("pivots", SIDES)
def test_gradients_reach_every_part(pivots):
    layer = make_layer(pivots)[0].double()
    assert torch.autograd.gradcheck(layer, (torch.randn(3, 12, dtype=torch.float64, requires_grad=True),))
    layer(torch.randn(3, 12).double()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("pivots", SIDES)
def test_a_cast_and_a_copy_leave_the_index(pivots):
    layer = make_layer(pivots)[0]
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert twin.index.dtype == torch.int32
    assert torch.equal(twin.index, layer.index)
    assert twin.basis.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("pivots", SIDES)
def test_back_to_a_pair(pivots):
    model = nn.Sequential(nn.Linear(12, 10)).double()
    factorize_(model, "0", normal(4, 12), normal(10, 4, seed=1))
    weight = model[0].weight
    store_(model, "0", "pivoted", pivots=pivots)
    pair = store_(model, "0", "pair")
    assert pair.spec() == {"storage": "pair", "rank": 4}
    torch.testing.assert_close(pair.weight, weight, rtol=0, atol=1e-12)
    assert store_(model, "0", "pair") is pair


@pytest.mark.parametrize("pivots", SIDES)
def test_spec_and_empty_like_are_inverse(pivots):
    layer = make_layer(pivots)[0]
    again = empty_like(nn.Linear(12, 10), layer.spec())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}
    assert again.spec() == layer.spec() == {"storage": "pivoted", "rank": 4, "pivots": pivots}
    assert is_factorized(again)
    assert f"rank=4, pivots='{pivots}'" in repr(layer)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"rank": 10, "pivots": "rows"}, r"rank is 10, but .* in \[1, 9\], one below the full rank"),
        ({"rank": 3}, "pivots is None, but it must be 'rows' or 'columns'"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        empty_like(nn.Linear(12, 10), {"storage": "pivoted", **spec})


def test_only_factors_are_stored():
    with pytest.raises(ValueError, match="0: is a Linear, not a factorised layer"):
        store_(nn.Sequential(nn.Linear(12, 10)), "0", "pivoted")


def test_the_ledger_counts_what_the_layer_has():
    layer, _, _ = make_layer()
    group = Group((Target("0", 0, "0", 10, 12, True),))
    assert ledger.parameters(group, 4, "pivoted") == layer.basis.weight.numel() + layer.coefficients.weight.numel()
    assert ledger.index_bytes(group, 4, "pivoted") == layer.index.nbytes
    assert ledger.parameters(group, 10, "pivoted") == group.parameters
    for allowance in range(150):
        rank = ledger.largest_rank(group, allowance, "pivoted")
        assert rank == max((r for r in range(1, 11) if r * (22 - r) <= allowance), default=0)


def test_a_plan_that_cannot_be_stored_is_refused():
    targets = [Target(f"{i}", i, "a", 8, 12, False) for i in (0, 1)]
    with pytest.raises(PlanError, match=r"0: rank 8 of 8, .* cannot have storage 'pivoted', since it has full rank"):
        resolve(Plan((Entry(("0",), 8, "pivoted"),)), targets)
    with pytest.raises(PlanError, match=r"0: .* cannot have storage 'pivoted', since it shares its basis"):
        resolve(Plan((Entry(("0", "1"), 4, "pivoted"),)), targets)
    spec = {"storage": "pivoted", "rank": 4, "pivots": "rows"}
    with pytest.raises(ValueError, match="'pivoted' shares no basis"):
        hf.EckartConfig({"a": spec, "b": {**spec, "basis_of": "a"}})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_as_it_was(family, make, ids, tokenizer, tmp_path):
    model = make(family)
    with torch.no_grad():
        pair = model(ids).logits
        names = pivot_all_(model)
        before = model(ids).logits
    torch.testing.assert_close(before, pair, rtol=0, atol=2e-4 * float(pair.abs().max()))
    plan = Plan(tuple(Entry((n,), s["rank"], s["storage"]) for n, s in hf.specs_of(model).items()))
    checkpoint.save(model, tmp_path / "a", tokenizer=tokenizer, plan=plan)
    loaded = checkpoint.load(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, before)
    assert all(isinstance(loaded.get_submodule(name), PivotedLinear) for name in names)
    checkpoint.save(loaded, tmp_path / "b", plan=plan)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("family", ["llama-bias", "gpt2", "opt"])
def test_convert_changes_the_storage_and_not_the_model(family, make, ids, tokenizer, tmp_path):
    model = make(family)
    with torch.no_grad():
        before = model(ids).logits
    checkpoint.save(model, tmp_path / "pair", tokenizer=tokenizer)
    pivoted = eckart.convert(tmp_path / "pair", storage="pivoted", out=tmp_path / "pivoted")
    dense = eckart.convert(tmp_path / "pivoted", storage="dense", out=tmp_path / "dense")
    pair = eckart.convert(tmp_path / "pivoted", storage="pair", out=tmp_path / "again")
    assert pivoted.changed == pair.changed == dense.changed == len(discover(tiny_models()[family]()).targets)
    assert pivoted.ledger.target_parameters_kept < pair.ledger.target_parameters_kept
    assert dense.ledger.keep == 1
    for folder in ("pivoted", "dense", "again"):
        with torch.no_grad():
            logits = checkpoint.load_model(str(tmp_path / folder))(ids).logits
        torch.testing.assert_close(logits, before, rtol=0, atol=2e-4 * float(before.abs().max()))
    assert type(checkpoint.load(tmp_path / "dense")) is type(model)
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()
    reached = checkpoint.read_plan(tmp_path / "pivoted").reached
    assert reached["keep"] == pivoted.ledger.keep


def test_convert_leaves_what_cannot_be_pivoted(make, ids, tokenizer, tmp_path):
    model = make("llama", share=1.0)
    q0, q1 = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    share_basis_(q0, q1)
    checkpoint.save(model, tmp_path / "pair", tokenizer=tokenizer)
    made = eckart.convert(tmp_path / "pair", storage="pivoted", out=tmp_path / "out")
    assert made.changed == 0
    assert set(made.left.values()) == {"has full rank"}


def test_convert_refuses_what_it_cannot_do(make, tokenizer, tmp_path):
    checkpoint.save(make("llama"), tmp_path / "pair", tokenizer=tokenizer)
    with pytest.raises(OptionError, match="storage is 'folded', but must be pair, pivoted, dense"):
        eckart.convert(tmp_path / "pair", storage="folded", out=tmp_path / "out")
    with pytest.raises(OutputError):
        eckart.convert(tmp_path / "pair", storage="dense", out=tmp_path / "pair")
