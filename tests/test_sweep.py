"""Statistics of the block-by-block sweep against plain hooks and plain autograd on the whole model."""

import pytest
import torch

from eckart.errors import NumericalError
from eckart.model.discovery import discover
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, pass_blocks, run_tail, split_batches
from eckart.portable.linear import weight_view
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.testing import tiny_models

FAMILIES = sorted(tiny_models())


def token_windows(count=5, length=12, seed=0):
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def collect(model, layout, windows, *needs, batch_tokens=24):
    result = {}
    for per_block in sweep(model, layout, windows, needs, batch_tokens=batch_tokens):
        result.update(per_block)
    return result


def inputs_by_hook(model, layout, windows):
    """The inputs of every target in one plain run of the whole model."""
    seen, handles = {}, []
    for target in layout.targets:

        def hook(module, args, name=target.name):
            seen[name] = args[0].detach().reshape(-1, args[0].shape[-1]).double()

        handles.append(model.get_submodule(target.name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_equal_those_of_a_plain_run(family):
    model, windows = tiny_models()[family](), token_windows()
    layout = discover(model)
    collected = collect(model, layout, windows, Need.SMALLER_GRAM, Need.INPUT_ABSMEAN)
    for name, x in inputs_by_hook(model, layout, windows).items():
        found, weight = collected[name], weight_view(model.get_submodule(name)).double()
        assert found.tokens == windows.numel()
        if found.input_gram is not None:
            assert torch.allclose(found.input_gram.matrix, x.T @ x, rtol=1e-4, atol=1e-3)
        else:
            y = x @ weight.T
            assert weight.shape[0] < weight.shape[1]
            assert torch.allclose(found.output_gram.matrix, y.T @ y, rtol=1e-4, atol=1e-3)
        assert found.input_energy == pytest.approx(float(x.square().sum() / x.shape[1]), rel=1e-5)
        assert torch.allclose(found.input_absmean, x.abs().mean(0), rtol=1e-4, atol=1e-6)


def test_linears_that_share_an_input_share_one_gram():
    model = tiny_models()["llama"]()
    collected = collect(model, discover(model), token_windows(), Need.INPUT_GRAM)
    block = "model.layers.0."
    q, k, o = (collected[f"{block}self_attn.{kind}_proj"].input_gram for kind in "qko")
    gate, up = (collected[f"{block}mlp.{kind}_proj"].input_gram for kind in ("gate", "up"))
    assert q is k
    assert gate is up
    assert len({id(gram) for gram in (q, o, gate)}) == 3


def test_the_smaller_side_is_collected():
    model = tiny_models()["llama"]()
    collected = collect(model, discover(model), token_windows(), Need.SMALLER_GRAM)
    down, up = (collected[f"model.layers.1.mlp.{kind}_proj"] for kind in ("down", "up"))
    assert down.input_gram is None
    assert down.output_gram.matrix.shape == (32, 32)
    assert up.output_gram is None


def test_only_what_is_needed_is_collected():
    model = tiny_models()["llama"]()
    found = collect(model, discover(model), token_windows(), Need.INPUT_ABSMEAN)["model.layers.0.mlp.up_proj"]
    assert found.input_gram is None
    assert found.output_gram is None
    assert found.fisher_rows is None


def test_batch_size_does_not_change_the_sums():
    model, windows = tiny_models()["qwen3"](), token_windows()
    layout = discover(model)
    one = collect(model, layout, windows, Need.INPUT_GRAM, batch_tokens=12)
    all_at_once = collect(model, layout, windows, Need.INPUT_GRAM, batch_tokens=10_000)
    for name in one:
        assert torch.allclose(one[name].input_gram.matrix, all_at_once[name].input_gram.matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_weight_fisher_equals_autograd_of_the_true_next_token_loss(family):
    """The oracle shifts once, by hand, and never passes `labels`; a doubled shift fails here."""
    model, windows = tiny_models()[family](), token_windows(count=3)
    layout = discover(model)
    collected = collect(model, layout, windows, Need.WEIGHT_FISHER)
    expected = {target.name: 0.0 for target in layout.targets}
    for window in windows:
        model.zero_grad()
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:]).backward()
        for name in expected:
            module = model.get_submodule(name)
            gradient = module.weight.grad.double()
            transposed = weight_view(module).stride() != module.weight.stride()
            expected[name] += (gradient.T if transposed else gradient).square()
    for name, squares in expected.items():
        assert torch.allclose(collected[name].fisher_rows, squares.sum(1), rtol=1e-3, atol=1e-12)
        assert torch.allclose(collected[name].fisher_columns, squares.sum(0), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_gives_the_logits_of_the_model(family):
    model, windows = tiny_models()[family](), token_windows(count=4)
    residence = residence_of(model, discover(model))
    with torch.no_grad():
        stream = pass_blocks(residence, open_stream(model, residence, split_batches(windows, 24)))
        logits = torch.cat([run_tail(model, residence, stream, i).logits for i in range(len(stream.batches))])
        assert torch.allclose(logits, model(input_ids=windows, use_cache=False).logits, atol=1e-5)
    assert all("forward" not in block.__dict__ for block in residence.structure)


def test_arguments_that_repeat_are_kept_once():
    model, windows = tiny_models()["llama"](), token_windows(count=6)
    stream = open_stream(model, residence_of(model, discover(model)), split_batches(windows, 24))
    tables = {id(calls[0].kwargs["position_embeddings"][0]) for calls in stream.calls}
    assert len(stream.calls) == 3
    assert len(tables) == 1


def test_infinite_activations_stop_with_the_name_of_the_module():
    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: NaN or infinity"):
        collect(model, discover(model), token_windows(), Need.SMALLER_GRAM)


def test_what_waits_on_disk_is_what_waits_in_memory(tmp_path):
    """The backward run reads the entrances of its blocks from files, and leaves none behind."""
    model = tiny_models()["llama"]()
    windows = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    needs = (Need.WEIGHED_GRAM, Need.GRADIENT_GRAM)
    found = []
    for spill in (None, tmp_path):
        blocks = sweep(model, discover(model), windows, needs, batch_tokens=24, spill=spill)
        if spill is not None:
            first = next(blocks)
            assert len(list(tmp_path.iterdir())) == len(model.model.layers)
            found.append({**first, **{name: value for block in blocks for name, value in block.items()}})
        else:
            found.append({name: value for block in blocks for name, value in block.items()})
    assert not list(tmp_path.iterdir())
    for name, kept in found[0].items():
        assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(kept.grams, found[1][name].grams, strict=True))
