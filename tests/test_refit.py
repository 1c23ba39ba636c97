"""Coefficients refitted to the compressed model's own activations, against a least-squares solver."""

import copy

import pytest
import torch

from eckart.errors import NumericalError, OptionError
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_
from eckart.plans.plan import Plan
from eckart.portable.linear import share_basis_, swap_, weight_view
from eckart.recipes import find
from eckart.refiners.base import Refinement
from eckart.refiners.refit_coefficients import RefitCoefficients, coefficient_change
from eckart.storages.pair import FactorizedLinear
from eckart.testing import tiny_models
from eckart.types import Entry


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_refit_equals_a_least_squares_solver():
    weight, basis, coefficients, x = normal(7, 12), normal(4, 12, seed=1), normal(7, 4, seed=2), normal(50, 12, seed=3)
    solved = torch.linalg.lstsq(x @ basis.T, x @ weight.T).solution.T
    found = coefficients + coefficient_change(weight - coefficients @ basis, basis, x.T @ x, 1e-14)
    torch.testing.assert_close(found, solved, rtol=1e-10, atol=1e-10)


def test_directions_without_data_keep_their_coefficients():
    weight, basis, coefficients = normal(7, 12), normal(4, 12, seed=1), normal(7, 4, seed=2)
    residual = weight - coefficients @ basis
    assert not coefficient_change(residual, basis, torch.zeros(12, 12).double(), 1e-6).any()
    x = normal(2, 12, seed=3)  # fewer tokens than ranks: the fit on them is perfect, the rest stays
    found = coefficients + coefficient_change(residual, basis, x.T @ x, 1e-9)
    torch.testing.assert_close(x @ basis.T @ found.T, x @ weight.T, rtol=1e-5, atol=1e-5)
    unseen = torch.linalg.svd(x @ basis.T).Vh[2:]  # directions of the basis that x never enters
    torch.testing.assert_close(found @ unseen.T, coefficients @ unseen.T, rtol=1e-4, atol=1e-4)


def compressed(family="llama", share=0.4, shared=True):
    """A tiny model in float64 cut by plain SVD, with q sharing a basis, and its dense weights."""
    model = tiny_models()[family]().double()
    layout = discover(model)
    dense = {t.name: weight_view(model.get_submodule(t.name)) for t in layout.targets}
    entries = []
    for name, weight in dense.items():
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        rank = max(1, int(share * len(s)))
        factorize_(model, name, vt[:rank], u[:, :rank] * s[:rank])
        entries.append(Entry((name,), rank))
    if shared:
        q = [name for name in dense if name.endswith("q_proj")]
        share_basis_(*(model.get_submodule(name) for name in q))
        entries = [e for e in entries if e.name not in q] + [Entry(tuple(q), entries[0].rank)]
    windows = torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(0))
    return model, Refinement(model, layout, Plan(tuple(entries)), dense, windows)


def inputs(model, names, windows):
    """The inputs of the layers in one plain run, `[tokens, in]`."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_is_the_least_squares_fit_to_the_model_before_any_refit(family):
    """One shot: the inputs of block 1 come from a block 0 that is not refitted yet."""
    model, work = compressed(family, shared=family == "llama")
    before = copy.deepcopy(model)
    RefitCoefficients(damping=1e-13).refine_(work)
    for name, x in inputs(before, work.dense_weights, work.windows).items():
        layer = model.get_submodule(name)
        basis, found = layer.basis.weight.detach(), layer.coefficients.weight.detach()
        solved = torch.linalg.lstsq(x @ basis.T, x @ work.dense_weights[name].T).solution.T
        # The sums hold products of float64 activations; a basis row of little energy sets the tolerance.
        torch.testing.assert_close(x @ basis.T @ found.T, x @ basis.T @ solved.T, rtol=1e-6, atol=1e-6)
        assert torch.equal(basis, before.get_submodule(name).basis.weight)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_the_outputs_come_closer_to_those_of_the_dense_weights():
    model, work = compressed()
    before = copy.deepcopy(model)
    RefitCoefficients().refine_(work)
    for name, x in inputs(before, work.dense_weights, work.windows).items():
        dense = work.dense_weights[name]
        old, new = (m.get_submodule(name).weight.detach() for m in (before, model))
        assert float((x @ (dense - new).T).norm()) < float((x @ (dense - old).T).norm())


def test_a_shared_basis_stays_shared():
    model, work = compressed()
    RefitCoefficients().refine_(work)
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    assert isinstance(first, FactorizedLinear)
    assert first.basis.weight is second.basis.weight


def test_full_rank_gives_the_dense_model_back():
    dense = tiny_models()["llama"]().double()
    model, work = compressed(share=1.0, shared=False)
    with torch.no_grad():
        for name in work.dense_weights:
            model.get_submodule(name).coefficients.weight.mul_(0.9)  # something to mend
    RefitCoefficients(damping=1e-12).refine_(work)
    with torch.no_grad():
        mended, wanted = model(work.windows).logits, dense(work.windows).logits
    torch.testing.assert_close(mended, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_preserved_columns_stay_and_the_rest_is_fitted():
    model, work = compressed(shared=False)
    name, kept = "model.layers.0.mlp.up_proj", torch.tensor([3, 8, 20])
    rest = torch.tensor([i for i in range(32) if i not in kept])
    weight, other = work.dense_weights[name], tiny_models()["llama"]().double()
    swap_(model, name, other.get_submodule(name))
    factorize_(model, name, normal(6, 29), normal(64, 6, seed=1), kept, weight[:, kept])
    before = copy.deepcopy(model)
    RefitCoefficients(damping=1e-12).refine_(work)
    layer, x = model.get_submodule(name), inputs(before, [name], work.windows)[name]
    assert torch.equal(layer.kept.weight, weight[:, kept])
    z = x[:, rest] @ layer.basis.weight.detach().T
    solved = torch.linalg.lstsq(z, x[:, rest] @ weight[:, rest].T).solution.T
    torch.testing.assert_close(layer.coefficients.weight.detach(), solved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("keep", "runs"), [(0.8, False), (0.601, False), (0.6, True), (0.5998, True), (0.3, True)])
def test_it_runs_from_40_percent_removed(keep, runs):
    (refiner,) = find("d-rank").make_refiners()
    assert refiner.applies(keep) is runs
    assert RefitCoefficients(min_removed=0).applies(1.0)


@pytest.mark.parametrize(("option", "value"), [("min_removed", "1.5"), ("min_removed", "-1"), ("damping", "0")])
def test_impossible_options(option, value):
    with pytest.raises(OptionError, match=rf"refit_coefficients\.{option} is "):
        find("d-rank", {f"refit_coefficients.{option}": value})


def test_a_dense_weight_that_is_not_finite_is_named():
    _, work = compressed()
    name = "model.layers.0.mlp.up_proj"
    work.dense_weights[name] = work.dense_weights[name] * torch.nan
    with pytest.raises(NumericalError, match=rf"^{name}: NaN or infinity in its refitted coefficients\.$"):
        RefitCoefficients().refine_(work)
