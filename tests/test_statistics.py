"""Sums that keep their digits."""

import pytest
import torch

from eckart.errors import NumericalError
from eckart.statistics.at_inputs import finish_inputs
from eckart.statistics.sums import Gram, GroupStatistics, Need, Statistics
from eckart.types import Target


def test_half_a_million_tokens_lose_no_digits():
    """Chunks in float32, sums in float64: within 1e-6 of float64, where one float32 sum is worse."""
    generator = torch.Generator().manual_seed(0)
    gram, exact = Gram(24), torch.zeros(24, 24, dtype=torch.float64)
    single = torch.zeros(24, 24)
    scale = torch.logspace(-2, 2, 24)
    for _ in range(256):
        x = (torch.randn(2048, 24, generator=generator) + 1) * scale
        gram.add_(x)
        exact += x.double().T @ x.double()
        single += x.T @ x
    error = ((gram.matrix - exact).abs() / exact.abs()).max()
    assert gram.tokens == 524_288
    assert error < 1e-6
    assert ((single - exact).abs() / exact.abs()).max() > 3 * error


def test_float64_input_stays_float64():
    gram, x = Gram(3), torch.randn(5, 3, dtype=torch.float64)
    gram.add_(x)
    assert torch.equal(gram.matrix, x.T @ x)


def test_side_is_made_once():
    gram = Gram(3)
    gram.add_(torch.randn(5, 3))
    assert gram.side(1e-6) is gram.side(1e-6)
    assert gram.side(1e-6) is not gram.side(1e-3)


def test_input_metric_from_the_output_gram_equals_the_one_from_the_input_gram():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    x = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    inputs, outputs = Gram(9), Gram(4)
    inputs.add_(x)
    outputs.add_(x @ weight.T)
    seen = GroupStatistics((Statistics(6, input_gram=inputs),)).input_metric(weight, 1e-3)
    through = GroupStatistics(
        (Statistics(6, output_gram=outputs, input_energy=float(x.square().sum() / 9)),)
    ).input_metric(weight, 1e-3)
    assert torch.allclose(seen.right.sandwich(weight), through.outer, rtol=1e-12)


def test_a_group_sums_the_grams_of_its_members():
    grams = [Gram(3), Gram(3)]
    rows = [torch.randn(5, 3, dtype=torch.float64) for _ in grams]
    for gram, x in zip(grams, rows, strict=True):
        gram.add_(x)
    side = GroupStatistics(tuple(Statistics(5, input_gram=g) for g in grams)).input_side(0.0)
    both = torch.cat(rows)
    assert torch.allclose(side.gram, both.T @ both, rtol=1e-12)


def test_a_layer_that_shares_its_input_now_and_then_is_named():
    """Its Gram has seen other tokens than it has."""
    target, gram = Target("blocks.0.q", 0, "q", 4, 6, False), Gram(6)
    gram.add_(torch.ones(3, 6))
    with pytest.raises(
        NumericalError,
        match=r"^blocks\.0\.q: shared its input tensor with other layers in some batches and not in others;",
    ):
        finish_inputs(target, Statistics(tokens=5, input_gram=gram), frozenset({Need.INPUT_GRAM}))
