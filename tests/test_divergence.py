"""KL through a linear head against both distributions written out, in float64."""

import pytest
import torch

from eckart.maths.divergence import Head, divergence, reference


def setting(tokens=9, width=16, vocabulary=50, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    head = Head(draw(vocabulary, width).to(dtype), draw(vocabulary).to(dtype) if bias else None)
    return head, draw(tokens, width).to(dtype), draw(tokens, width).to(dtype)


def oracle(head, one, other):
    bias = 0 if head.bias is None else head.bias.double()
    p, q = ((state.double() @ head.weight.double().T + bias).log_softmax(-1) for state in (one, other))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("elements", [1, 70, 10**6])  # one word, seven words, all at a time
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_both_distributions_written_out(elements, bias, monkeypatch):
    monkeypatch.setattr("eckart.maths.divergence.SLICE_ELEMENTS", elements)
    head, one, other = setting(bias=bias)
    found = divergence(head, reference(head, one), other)
    torch.testing.assert_close(found, oracle(head, one, other), rtol=1e-5, atol=1e-6)
    assert divergence(head, reference(head, one), one).abs().max() == 0


def test_float64_keeps_its_digits():
    head, one, other = setting(dtype=torch.float64)
    near = one + 1e-4 * other
    expected = oracle(head, one, near)
    assert expected.max() < 1e-5
    torch.testing.assert_close(divergence(head, reference(head, one), near), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_small_divergences_keep_their_digits_in_float32(step):
    head, one, other = setting(tokens=200)
    near = one + step * other
    found = divergence(head, reference(head, one), near)
    expected = oracle(head, one, near)
    assert expected.mean() < 1e-3
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=0.1 * 1e-4 / step + 1e-5, atol=0)
    naive = [(state @ head.weight.T + head.bias).log_softmax(-1) for state in (one, near)]
    error = float((naive[0].exp() * (naive[0] - naive[1])).sum().double() / expected.sum() - 1)
    assert abs(float(found.sum() / expected.sum()) - 1) < abs(error)


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_logits_far_from_the_reference_do_not_overflow(scale):
    head, one, other = setting()
    expected = oracle(head, one, scale * other)
    assert expected.max() > 100
    torch.testing.assert_close(divergence(head, reference(head, one), scale * other), expected, rtol=1e-5, atol=0)


def test_narrow_weights_compute_in_float32():
    head, one, other = setting(dtype=torch.bfloat16)
    torch.testing.assert_close(
        divergence(head, reference(head, one), other), oracle(head, one, other), rtol=1e-5, atol=1e-6
    )
