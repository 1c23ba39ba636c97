"""How far the metric still moves: against plain sums, and the sense of it (more text, less movement)."""

import pytest
import torch

import eckart
from eckart.model.discovery import discover
from eckart.statistics.sums import Gram, Need
from eckart.statistics.sweep import sweep
from eckart.testing import tiny_models, tiny_tokenizer

TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (20_000,), generator=torch.Generator().manual_seed(0)))


def relative_change(x, early):
    whole, before = x.T @ x / len(x), x[:early].T @ x[:early] / early
    return float((whole - before).norm() / whole.norm())


def test_a_gram_tells_how_far_its_mean_moved_since_the_mark():
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = Gram(5)
    gram.add_(x[:25])
    assert gram.drift is None
    gram.mark()
    assert gram.drift == pytest.approx(0.0, abs=1e-12)
    gram.add_(x[25:])
    assert gram.drift == pytest.approx(relative_change(x, 25))


@pytest.mark.parametrize("need", [Need.INPUT_GRAM, Need.GRADIENT_GRAM])
def test_the_sweep_marks_after_three_quarters_of_its_batches(need):
    model = tiny_models()["llama"]()
    windows = torch.randint(3, 128, (8, 12), generator=torch.Generator().manual_seed(0))
    name = "model.layers.1.mlp.down_proj"

    def mean(count, seen):
        for per_block in sweep(model, discover(model), windows[:count], {need}, batch_tokens=24):
            if name in per_block:
                (gram,) = per_block[name].grams
                seen.append(gram)

    grams = []
    mean(8, grams)
    mean(6, grams)
    whole, early = (gram.matrix / gram.tokens for gram in grams)
    assert grams[0].drift == pytest.approx(float((whole - early).norm() / whole.norm()), rel=1e-5)


def test_one_batch_has_no_drift_and_says_nothing():
    model = tiny_models()["llama"]()
    for per_block in sweep(model, discover(model), torch.full((2, 8), 7), {Need.INPUT_GRAM}):
        assert all(gram.drift is None for statistics in per_block.values() for gram in statistics.grams)


def test_the_metric_moves_less_with_more_windows_and_the_checkpoint_says_how_far(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def median(windows):
        calibration = eckart.Calibration(str(tmp_path / "text.txt"), windows, 64)
        made = eckart.compress(
            tiny_models()["llama"](), tokenizer=tiny_tokenizer(), recipe="svd-llm", calibration=calibration
        )
        told = made.provenance["metric_drift"]
        assert 0 < told["median"] <= told["most"]
        assert told["most_of"] in {target.name for target in made.layout.targets}
        return told["median"]

    assert median(288) < 0.7 * median(64)  # 2048 tokens a batch: 9 batches and 2
