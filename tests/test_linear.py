"""The factorised layer is a linear layer in every way that code around it may ask for."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from eckart.model.factorise import factorize_
from eckart.portable.linear import empty_like, is_linear, share_basis_, swap_, weight_view
from eckart.storages.pair import FactorizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> FactorizedLinear:
    torch.manual_seed(0)
    return FactorizedLinear(12, 10, 4, bias=bias, dtype=dtype)


def svd_factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return vt[:rank], u[:, :rank] * s[:rank]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product(dtype: torch.dtype, bias: bool) -> None:
    layer = make_layer(bias, dtype)
    x = torch.randn(2, 3, 12, dtype=dtype)
    wide = FactorizedLinear(12, 10, 4, bias=bias, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    expected = nn.functional.linear(x.double(), wide.weight, wide.bias)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )


def test_weight_and_bias_are_those_of_a_linear() -> None:
    layer = make_layer()
    assert layer.weight.shape == (10, 12)
    assert layer.bias is layer.coefficients.bias
    assert make_layer(bias=False).bias is None
    assert "in_features=12, out_features=10, rank=4" in repr(layer)
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(10, 12)


def test_compiles_whole() -> None:
    layer, x = make_layer(), torch.randn(3, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_gradients_reach_every_factor() -> None:
    layer = make_layer().double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_deepcopy_is_equal_and_apart() -> None:
    layer = make_layer()
    twin, x = copy.deepcopy(layer), torch.randn(3, 12)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.basis.weight.zero_()
    assert layer.basis.weight.abs().sum() > 0


def test_deepcopy_keeps_a_shared_basis() -> None:
    pair = nn.ModuleList([make_layer(), make_layer()])
    share_basis_(pair[0], pair[1])
    twins = copy.deepcopy(pair).to(torch.bfloat16)
    assert twins[0].basis.weight is twins[1].basis.weight


def test_state_dict_passes_through_safetensors(tmp_path) -> None:  # type: ignore[no-untyped-def]
    layer, other = make_layer(), FactorizedLinear(12, 10, 4, bias=True)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert sorted(state) == ["basis.weight", "coefficients.bias", "coefficients.weight"]
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)


def test_full_rank_gives_the_layer_back() -> None:
    model = nn.Sequential(nn.Linear(12, 10)).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = model(x)
    factorize_(model, "0", *svd_factors(weight_view(model[0]), 10))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_full_rank_gives_a_conv1d_back() -> None:
    model = nn.Sequential(Conv1D(10, 10)).double()
    nn.init.normal_(model[0].bias)
    x = torch.randn(5, 10, dtype=torch.float64)
    expected = model(x)
    assert is_linear(model[0])
    factorize_(model, "0", *svd_factors(weight_view(model[0]), 10))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factorize_keeps_dtype_mode_and_gradient_flag(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 10, dtype=dtype)).eval().requires_grad_(False)
    new = factorize_(model, "0", torch.ones(3, 12), torch.ones(10, 3))
    assert {p.dtype for p in new.parameters()} == {dtype}
    assert not new.training
    assert not any(p.requires_grad for p in new.parameters())


def test_building_a_layer_draws_no_random_numbers() -> None:
    dense = nn.Linear(12, 10)
    before = torch.get_rng_state()
    empty_like(dense, {"storage": "pair", "rank": 3})
    assert torch.equal(torch.get_rng_state(), before)


def test_spec_and_empty_like_are_inverse() -> None:
    layer = make_layer()
    again = empty_like(nn.Linear(12, 10), layer.spec())
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}
    assert again.spec() == layer.spec()


def test_empty_like_stays_on_meta() -> None:
    new = empty_like(nn.Linear(12, 10, device="meta"), {"storage": "pair", "rank": 3})
    assert all(p.is_meta for p in new.parameters())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"storage": "folded", "rank": 3}, "storage is 'folded'"),
        ({"rank": 3}, "storage is None"),
        ({"storage": "pair", "rank": 0}, r"rank is 0, but it must be a whole number in \[1, 12\]"),
        ({"storage": "pair", "rank": 13}, "rank is 13"),
        ({"storage": "pair", "rank": True}, "rank is True"),
        ({"storage": "pair", "rank": "3"}, "rank is '3'"),
        ({"storage": "pair"}, "rank is None"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(spec: dict, words: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=words):
        empty_like(nn.Linear(12, 10), spec)


@pytest.mark.parametrize(("basis", "coefficients"), [((3, 1), (10, 3)), ((3, 12), (1, 3)), ((3, 12), (10, 4))])
def test_factors_of_a_wrong_shape_do_not_broadcast(basis: tuple[int, ...], coefficients: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(ValueError, match=r"^0: basis is \[3, \d+\] and coefficients .* needs \[rank, 12\]"):
        factorize_(model, "0", torch.ones(basis), torch.ones(coefficients))
    assert type(model[0]) is nn.Linear


def test_bases_of_different_shape_are_not_shared() -> None:
    with pytest.raises(ValueError, match=r"a basis \[5, 12\] cannot serve a layer that needs \[4, 12\]"):
        share_basis_(FactorizedLinear(12, 10, 5), make_layer())


def test_weight_view_refuses_a_factorized_layer() -> None:
    with pytest.raises(TypeError, match="no dense weight"):
        weight_view(make_layer())


def test_swap_returns_what_was_there() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(12, 10))})
    old, new = model["a"][0], make_layer()
    assert swap_(model, "a.0", new) is old
    assert model["a"][0] is new


def test_imports_torch_alone() -> None:
    code = "import sys, eckart.linear; assert not {'transformers', 'safetensors', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
