"""Duo-SVD as a recipe: from a model to a checkpoint, resumable, replayable, within its budget."""

from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.plans.plan import Plan
from eckart.storages.columns import KeptColumnsLinear
from eckart.support.cache import cache_folder
from eckart.testing import tiny_models, tiny_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "12", "dogs,", "or", "so."]
    picks = torch.randint(len(words), (900,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(" ".join(words[i] for i in picks))
    return str(path)


def compress(text: str, tmp_path: Path, **options: Any) -> eckart.Compression:
    settings = {"recipe": "duo-svd", "keep": 0.6, "work": tmp_path / "work", **options}
    if settings["recipe"] == "duo-svd":
        settings["options"] = {"allocator.windows": 2, "allocator.length": 16, **settings.get("options", {})}
    return eckart.compress(
        tiny_models()["llama"](),
        tokenizer=tiny_tokenizer(),
        calibration=eckart.Calibration(text, windows=16, length=32),
        **settings,
    )


def test_recipe_runs_saves_and_replays(text: str, tmp_path: Path) -> None:
    made = compress(text, tmp_path, out=tmp_path / "out", options={"factorizer.compensated": "true"})
    assert made.ledger.keep <= 0.6
    assert any(isinstance(module, KeptColumnsLinear) for module in made.model.modules())
    assert all(entry.kept is not None for entry in made.plan.entries if entry.rank is not None)
    assert len(list((tmp_path / "work").glob("sensitivity-*.jsonl"))) == 1
    plan = Plan.load(tmp_path / "out" / "plan.json")
    again = compress(text, tmp_path, plan=plan, options={"factorizer.compensated": "true"})
    assert again.plan.entries == made.plan.entries
    ids = torch.randint(4, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    expected = made.model(ids).logits
    assert torch.equal(again.model(ids).logits, expected)
    assert torch.equal(eckart.load(tmp_path / "out")(ids).logits, expected)


def test_a_second_run_finds_its_measurements(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compress(text, tmp_path)
    monkeypatch.setattr("eckart.measuring.sensitivity.open_stream", None)  # without it nothing can run
    assert compress(text, tmp_path).plan == first.plan
    with pytest.raises(TypeError):
        compress(text, tmp_path, keep=0.7)  # another target has to be measured


def test_without_a_work_folder_the_journal_is_in_the_cache_and_never_in_the_users_own(
    text: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder().is_relative_to(tmp_path_factory.getbasetemp())  # what tests/conftest.py sees to
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    compress(text, tmp_path, work=None)
    assert len(list((tmp_path / "cache" / "work").glob("sensitivity-*.jsonl"))) == 1
    assert not (tmp_path / "home").exists()


def test_published_budget_may_exceed_and_says_so(text: str, tmp_path: Path) -> None:
    """A tiny model has fewer parameters than cells, so nothing is floored away; the plan is just not refused."""
    made = compress(text, tmp_path, options={"allocator.budget": "published"})
    assert made.plan.made_by["allocator"]["budget"] == "published"
    assert made.plan.reached["keep"] == pytest.approx(0.6, abs=0.02)


def test_fewer_shares_are_filled_by_the_fit(text: str, tmp_path: Path) -> None:
    made = compress(text, tmp_path, options={"allocator.measured": "0.4,1.0"})
    (journal,) = (tmp_path / "work").glob("*.jsonl")
    shares = {line.split('"share": ')[1].split(",")[0] for line in journal.read_text().splitlines()[1:]}
    assert shares == {"0.4", "0.6", "1.0"}
    assert made.ledger.keep <= 0.6


def test_cpsvd_runs(text: str, tmp_path: Path) -> None:
    made = compress(text, tmp_path, recipe="cpsvd")
    assert 0.5 < made.ledger.keep <= 0.6


def test_plans_with_columns_need_their_factorizer(text: str, tmp_path: Path) -> None:
    made = compress(text, tmp_path, options={"factorizer.compensated": "true"})
    with pytest.raises(eckart.UserError, match="this factorizer preserves none"):
        compress(text, tmp_path, plan=made.plan, recipe="svd-llm")
