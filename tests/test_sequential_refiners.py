"""The two gradient-free refiners that go block by block: sequential update and alternating regressions."""

from dataclasses import replace

import pytest
import torch
from test_block_collaborative import compressed, fit_to, make_model, text_windows

from eckart.errors import NumericalError, OptionError
from eckart.model.discovery import discover
from eckart.plans.plan import Plan
from eckart.refiners._block_factors import put_
from eckart.refiners._two_streams import two_streams
from eckart.refiners.alternating import Alternating, missing_cross
from eckart.refiners.base import Refinement
from eckart.refiners.sequential_update import SequentialUpdate
from eckart.testing import tiny_models


def inputs_of(model, name, windows):
    """What a layer reads in a plain run of the whole model, `[tokens, in]`, float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, 1).double()


def test_sequential_update_fits_every_layer_to_what_it_reads_in_the_final_model():
    """The last property that only the forward order gives: the coefficients are optimal on the *final* inputs."""
    work = compressed(make_model())
    bases = {name: work.model.get_submodule(name).basis.weight.detach().clone() for name in work.dense_weights}
    SequentialUpdate(damping=1e-12).refine_(work)
    for name, weight in work.dense_weights.items():
        layer = work.model.get_submodule(name)
        assert torch.equal(layer.basis.weight, bases[name])
        x = inputs_of(work.model, name, work.windows)
        seen = x @ layer.basis.weight.detach().double().T
        expected = torch.linalg.lstsq(seen, x @ weight.double().T).solution.T
        assert torch.allclose(layer.coefficients.weight.double(), expected, atol=1e-3 * float(expected.abs().max()))


def test_alternating_lowers_the_block_error_or_says_so(caplog):
    work = compressed(make_model())
    Alternating(batch=6).refine_(work)
    assert [notes["block"] for notes in work.notes] == [0, 1, 2]
    for notes in work.notes:
        assert (notes["reached"] < notes["as_found"]) != notes["rolled_back"]
        assert notes["tried"] == 2 * 4
    assert any(not notes["rolled_back"] for notes in work.notes)
    again = compressed(make_model())
    Alternating(batch=6).refine_(again)
    assert again.notes == work.notes


def test_what_alternating_is_compared_with_has_not_seen_what_judges_it():
    """A start that fits the held-out windows alone is not kept; with text of its own to judge on, it may be."""
    work = compressed(make_model())
    fit_to(work, work.windows[-2:])
    Alternating(batch=6).refine_(work)
    fair = compressed(make_model())
    Alternating(batch=6).refine_(fair)
    assert work.notes == fair.notes
    judged = replace(compressed(make_model()), unseen=text_windows(3, seed=77))
    Alternating(batch=6).refine_(judged)
    assert judged.notes[0]["as_found"] != fair.notes[0]["as_found"]


def test_the_missing_output_of_the_last_matrix_is_exact():
    """With the down projection dense and fitted to what is missing, the block reaches the goals as well as it can."""
    model, windows = make_model(), text_windows(8)
    layout = discover(model)
    (down,) = (t for t in layout.targets if t.block == 0 and t.kind.endswith("down_proj"))
    here = next(two_streams(Refinement(model, layout, Plan(()), {}, windows), [windows]))
    z = inputs_of(model, down.name, windows)
    goals = [torch.randn(8, windows.shape[1], 32, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        cross = missing_cross(here, down, goals, [0])
        here.block.mlp.down_proj.weight.copy_(torch.linalg.solve(z.T @ z, cross.T).T)
        residual = (goals[0] - here.run(0)).flatten(0, 1).double()
    # least squares leaves nothing that the inputs could still explain
    assert float((residual.T @ z).norm() / (residual.norm() * z.norm())) < 1e-3


@pytest.mark.parametrize("family", sorted(tiny_models()))
def test_every_family(family):
    for refiner in (SequentialUpdate(), Alternating(batch=3, sweeps=1)):
        work = compressed(tiny_models()[family](), count=6)
        refiner.refine_(work)
        assert all(bool(torch.isfinite(p).all()) for p in work.model.parameters())


def test_bad_options():
    for make, text in (
        (lambda: Alternating(share=1.5), "alternating.share is 1.5, but must lie in [0, 1]."),
        (lambda: Alternating(sweeps=0), "alternating.sweeps is 0, but must be positive."),
        (lambda: Alternating(held_out=1.0), "alternating.held_out is 1, but must lie in (0, 1)."),
        (lambda: SequentialUpdate(damping=0.0), "sequential_update.damping is 0, but must be positive."),
    ):
        with pytest.raises(OptionError) as caught:
            make()
        assert str(caught.value) == text


def test_a_block_that_is_broken_before_any_step_is_named():
    work = compressed(make_model(), count=6)
    with torch.no_grad():
        work.model.model.layers[1].input_layernorm.weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match=r"^block 1: its output holds NaN or infinity before any step\.$"):
        Alternating(batch=3).refine_(work)


def test_factors_that_are_not_finite_are_not_put_in():
    block = compressed(make_model()).model.model.layers[0]
    basis, coefficients = (p.detach().clone() for p in block.mlp.up_proj.parameters())
    with pytest.raises(NumericalError, match=r"^mlp\.up_proj: NaN or infinity in its refined factors\.$"):
        put_(block, {"mlp.up_proj": (basis * torch.nan, coefficients)})
    assert torch.equal(block.mlp.up_proj.basis.weight, basis)
