"""The shares of CPSVD, by hand."""

import math

import pytest
import torch

from eckart import ledger
from eckart.allocators.cpsvd import CPSVD, shared_out
from eckart.checks import problems_spectra
from eckart.errors import BudgetError, OptionError
from eckart.measuring.similarity import block_similarities
from eckart.model.discovery import discover
from eckart.testing import tiny_models
from eckart.types import Budget, Group, Spectrum, Target


def test_shared_out_is_proportional_up_to_the_caps() -> None:
    assert shared_out(6, [1, 2, 3], [9, 9, 9]) == pytest.approx([1, 2, 3])
    assert shared_out(6, [1, 2, 3], [9, 9, 1]) == pytest.approx([5 / 3, 10 / 3, 1])
    assert sum(shared_out(6, [1, 2, 3], [2, 2, 2])) == pytest.approx(6)


def test_layers_lose_by_the_softmax_of_their_influence() -> None:
    spectra = problems_spectra()
    entries = CPSVD(temperature=0.5).allocate(spectra, Budget(0.7))
    lost = [0.0] * 4
    for spectrum, entry in zip(spectra, entries, strict=True):
        group = spectrum.group
        lost[group.targets[0].block] += group.parameters - ledger.parameters(group, entry.rank)
    weights = [math.exp(-(0.1 + 0.1 * block) / 0.5) for block in range(4)]
    size = sum(s.group.parameters for s in spectra[:3])
    for found, weight in zip(lost, weights, strict=True):
        due = 0.3 * 4 * size * weight / sum(weights)
        assert 0 <= found - due <= sum(s.group.in_features + s.group.out_features for s in spectra[:3])


def test_modules_that_err_less_lose_more() -> None:
    """Two modules of one size; the flat spectrum errs more when it is cut, and so loses less."""
    groups = [Group((Target(name, 0, name, 32, 32, False),)) for name in ("flat", "steep")]
    values = (torch.ones(32).double(), torch.logspace(0, -6, 32).double())
    spectra = [Spectrum(g, v, observed={"similarity": 0.9}) for g, v in zip(groups, values, strict=True)]
    flat, steep = CPSVD().allocate(spectra, Budget(0.7))
    assert flat.rank is not None
    assert steep.rank is not None
    weight = math.exp(1 / (1 + 10 * math.tan(math.pi * 0.3 / 2)))
    assert flat.rank == int((1 - 0.6 / (1 + weight)) * 1024 / 64)
    assert steep.rank == int((1 - 0.6 * weight / (1 + weight)) * 1024 / 64)


def test_what_it_cannot_do_is_refused() -> None:
    plain = Spectrum(Group((Target("0", 0, "linear", 8, 8, False),)), torch.ones(8).double())
    with pytest.raises(OptionError, match="needs the similarity of its block"):
        CPSVD().allocate([plain], Budget(0.8))
    with pytest.raises(OptionError, match=r"cpsvd\.temperature is 0"):
        CPSVD(temperature=0)
    with pytest.raises(BudgetError, match=r"keeps at least 0\.1"):
        CPSVD().allocate(problems_spectra(), Budget(0.09))


@torch.no_grad()
def test_similarity_is_the_cosine_of_the_model_s_own_hidden_states() -> None:
    model = tiny_models()["llama"]()
    ids = torch.randint(4, 99, (3, 16), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    model(ids)
    expected = [float(torch.cosine_similarity(seen[2 * i], seen[2 * i + 1], dim=-1).mean()) for i in range(2)]
    assert block_similarities(model, discover(model), ids) == pytest.approx(expected, rel=1e-6)
