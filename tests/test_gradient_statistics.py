"""Gradient Grams of the block-by-block backward against autograd on the whole model, and the exact Fisher."""

import pytest
import torch

from eckart.errors import NumericalError
from eckart.model.discovery import discover
from eckart.portable.linear import weight_view
from eckart.statistics.at_outputs import mix, sample
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.testing import tiny_model, tiny_models

FAMILIES = sorted(tiny_models())


def token_windows(count=5, length=12, seed=0, vocabulary=128):
    return torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def collect(model, windows, *needs, batch_tokens=24, **options):
    result = {}
    for per_block in sweep(model, discover(model), windows, needs, batch_tokens=batch_tokens, **options):
        result.update(per_block)
    return result


def gradients_by_autograd(model, windows, labels):
    """Gradients of the summed loss for given labels at the output of every target, from one plain run."""
    seen, handles = {}, []
    targets = discover(model).targets
    for target in targets:

        def hook(module, args, output, name=target.name):
            output.retain_grad()
            seen[name] = output

        handles.append(model.get_submodule(target.name).register_forward_hook(hook))
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: y.grad.reshape(-1, y.shape[-1]).double() for name, y in seen.items()}


def assert_grams_are_those_of(gradients, collected, model, windows):
    for name, g in gradients.items():
        found, weight = collected[name], weight_view(model.get_submodule(name)).double()
        out_features, in_features = weight.shape
        if out_features > in_features:
            assert found.gradient_gram is None
            g_in = g @ weight
            expected, matrix = g_in.T @ g_in, found.pulled_gradient_gram.matrix
        else:
            assert found.pulled_gradient_gram is None
            expected, matrix = g.T @ g, found.gradient_gram.matrix
        torch.testing.assert_close(matrix, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert found.gradient_energy == pytest.approx(float(g.square().sum()) / out_features, rel=1e-4)
        assert found.predictions == windows.shape[0] * (windows.shape[1] - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_grams_of_true_labels_equal_autograd_on_the_whole_model(family):
    model, windows = tiny_models()[family](), token_windows()
    collected = collect(model, windows, Need.TRUE_GRADIENT_GRAM)
    assert_grams_are_those_of(gradients_by_autograd(model, windows, windows[:, 1:]), collected, model, windows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_grams_of_sampled_labels_equal_autograd_with_the_same_labels(family):
    """The oracle inverts the cumulative sum of the whole model's own logits, in float64."""
    model, windows = tiny_models()[family](), token_windows()
    generators = [torch.Generator().manual_seed(3 * 1_000_003 + number) for number in range(len(windows))]
    draws = torch.stack([torch.rand(11, generator=generator, dtype=torch.float64) for generator in generators])
    with torch.no_grad():
        sums = model(input_ids=windows, use_cache=False).logits[:, :-1].double().softmax(-1).cumsum(-1)
    labels = (draws[..., None] > sums).sum(-1)
    collected = collect(model, windows, Need.GRADIENT_GRAM, seed=3)
    assert_grams_are_those_of(gradients_by_autograd(model, windows, labels), collected, model, windows)


def test_inputs_are_collected_in_the_same_sweep():
    model, windows = tiny_models()["llama"](), token_windows()
    both = collect(model, windows, Need.GRADIENT_GRAM, Need.SMALLER_GRAM)
    inputs = collect(model, windows, Need.SMALLER_GRAM)
    for name, found in both.items():
        for field in ("input_gram", "output_gram"):
            mine, theirs = getattr(found, field), getattr(inputs[name], field)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine.matrix, theirs.matrix)
        assert found.tokens == windows.numel()
    block = "model.layers.0.self_attn."
    assert both[block + "q_proj"].input_gram is both[block + "k_proj"].input_gram


def test_labels_depend_on_the_seed_and_not_on_the_batches():
    model, windows = tiny_models()["qwen3"](), token_windows()
    one, all_at_once, other = (
        collect(model, windows, Need.GRADIENT_GRAM, batch_tokens=size, seed=seed)
        for size, seed in ((12, 0), (1000, 0), (12, 1))
    )
    for name, found in one.items():
        energies = [c[name].gradient_energy for c in (all_at_once, other)]
        assert energies[0] == pytest.approx(found.gradient_energy, rel=1e-4)
        assert energies[1] != pytest.approx(found.gradient_energy, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("need", [Need.GRADIENT_GRAM, Need.MIXED_GRADIENT_GRAM])
def test_drawn_labels_give_the_exact_fisher_on_average(need):
    """Tiny vocabulary: the expectation over labels is a sum over all of them, position by position."""
    model = tiny_model("Llama", vocab_size=7, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    windows, copies = token_windows(2, 5, vocabulary=7), 3000
    names = [f"model.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn.k_proj", "mlp.down_proj")]
    with torch.no_grad():
        probabilities = model(input_ids=windows, use_cache=False).logits[:, :-1].softmax(-1)
    exact = dict.fromkeys(names, 0.0)
    for window, per_position in zip(windows, probabilities, strict=True):
        for position, row in enumerate(per_position):
            for label, probability in enumerate(row):
                labels = torch.full((1, 4), -100)
                labels[0, position] = label
                gradients = gradients_by_autograd(model, window[None], labels)
                for name in names:
                    exact[name] += probability.double() * gradients[name].T @ gradients[name]
    collected = collect(model, windows.repeat(copies, 1), need, batch_tokens=10_000)
    for name in names:
        found = collected[name].gradient_gram.matrix / copies
        assert float((found - exact[name]).norm() / exact[name].norm()) < 0.05


def test_a_label_is_drawn_as_often_as_it_is_likely():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    draws = torch.arange(1000, dtype=torch.float64) / 1000
    labels = sample(probabilities.expand(1000, 4), draws)
    assert torch.bincount(labels).tolist() == pytest.approx([500, 0, 200, 300], abs=1)


def test_mixed_labels_have_the_mean_square_of_sampled_ones_and_less_noise():
    p = torch.tensor([0.97, 0.02, 0.01], dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    mixed = mix(p, signs)
    fisher = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(mixed.T @ mixed / len(mixed), fisher)
    noise = (mixed[:, :, None] * mixed[:, None] - fisher).square().sum((1, 2)).mean()
    one_label = p - torch.eye(3, dtype=torch.float64)
    noise_sampled = (p * (one_label[:, :, None] * one_label[:, None] - fisher).square().sum((1, 2))).sum()
    assert noise < 0.05 * noise_sampled


def test_different_labels_are_not_in_one_sweep():
    with pytest.raises(ValueError, match="cannot both be in one sweep"):
        collect(tiny_models()["llama"](), token_windows(), Need.GRADIENT_GRAM, Need.WEIGHT_FISHER)


def test_infinite_gradients_stop_with_the_name_of_the_module():
    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e38
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.\S+: NaN or infinity in its gradients"):
        collect(model, token_windows(), Need.TRUE_GRADIENT_GRAM)


def used_by_autograd(model, windows):
    """Inputs, outputs without the bias, and gradients of the text's own labels at every target, from one plain run."""
    seen, handles = {}, []
    for target in discover(model).targets:
        name, module = target.name, model.get_submodule(target.name)
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]})))
    gradients = gradients_by_autograd(model, windows, windows[:, 1:])
    for handle in handles:
        handle.remove()
    found = {}
    for name, g in gradients.items():
        x = seen[name].detach().reshape(-1, seen[name].shape[-1]).double()
        found[name] = (x, x @ weight_view(model.get_submodule(name)).double().T, g)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_weighed_grams_equal_a_plain_loop_over_tokens(family):
    """`sum_t (g^T G^-1 g / out) z z^T`, G the mean `g g^T`, a tenth of it its mean diagonal; z on the smaller side."""
    model, windows = tiny_models()[family](), token_windows()
    collected = collect(model, windows, Need.WEIGHED_GRAM, Need.TRUE_GRADIENT_GRAM)
    for name, (x, y, g) in used_by_autograd(model, windows).items():
        mean = g.T @ g / (windows.shape[0] * (windows.shape[1] - 1))
        shrunk = 0.9 * mean + 0.1 * mean.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        weights = [float(row @ torch.linalg.solve(shrunk, row)) / len(row) for row in g]
        wide = y.shape[1] <= x.shape[1]
        expected = sum(w * torch.outer(z, z) for w, z in zip(weights, y if wide else x, strict=True))
        found = collected[name].output_gram if wide else collected[name].input_gram
        torch.testing.assert_close(found.matrix, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        energy = sum(w * float(row @ row) for w, row in zip(weights, x, strict=True)) / x.shape[1]
        assert collected[name].input_energy == pytest.approx(energy, rel=1e-3)
        assert collected[name].tokens == windows.numel()


def test_weights_do_not_depend_on_the_batches_and_the_gradients_move_on_as_before():
    model, windows = tiny_models()["llama"](), token_windows()
    plain = collect(model, windows, Need.SMALLER_GRAM, Need.GRADIENT_GRAM)
    small, large = (collect(model, windows, Need.WEIGHED_GRAM, Need.GRADIENT_GRAM, batch_tokens=b) for b in (12, 1000))
    for name, found in small.items():
        for grams in ("gradient_gram", "pulled_gradient_gram", "input_gram", "output_gram"):
            one, other = getattr(found, grams), getattr(large[name], grams)
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(
                    one.matrix, other.matrix, rtol=1e-3, atol=1e-6 + 1e-4 * one.matrix.abs().max()
                )
        assert found.gradient_energy == pytest.approx(plain[name].gradient_energy, rel=1e-5)
