"""Sensitivities: the same as a naive evaluation of the whole model, and resumable."""

import json
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart import ledger
from eckart.factorizers.svd_llm import SVDLLM
from eckart.measuring.divergence import Divergence
from eckart.measuring.sensitivity import Curves, measure_curves
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_
from eckart.model.residence import residence_of
from eckart.model.store import Store
from eckart.model.walk import open_stream, split_batches
from eckart.planning.decomposed import decompose
from eckart.testing import tiny_model, tiny_models
from eckart.types import Budget, Group

SHARES = (0.3, 0.8, 1.0)


def windows() -> torch.Tensor:
    return torch.randint(4, 99, (3, 16), generator=torch.Generator().manual_seed(0))


def setting(family: str) -> tuple[Any, Any, Any]:
    model = tiny_models()[family]()
    layout = discover(model)
    groups = [Group((target,)) for target in layout.targets]
    return model, layout, decompose(model, layout, groups, SVDLLM(), windows())


def measure(family: str, work: Path, **options: Any) -> Curves:
    model, layout, made = setting(family)
    arguments = {"shares": SHARES, "depends": {"data": "random"}, **options}
    target = arguments.pop("target", 0.6)
    return measure_curves(model, layout, made.groups, made.cut, windows(), target, work=work, **arguments)


@torch.no_grad()
def naive(family: str, changed: dict[str, float], target: float = 0.6) -> float:
    """KL in nats per token by two whole models and no chunks."""
    model, _, made = setting(family)
    dense = model(windows()).logits.double().log_softmax(-1)
    for name, decomposition in made.items():
        share = changed.get(name, target)
        rank = ledger.rank_for(decomposition.group, share, Budget(share))
        if rank is not None:
            factors = decomposition.truncate(rank)
            factorize_(model, name, factors.basis, factors.coefficients[0])
    found = model(windows()).logits.double().log_softmax(-1)
    return float((dense.exp() * (dense - found)).sum() / windows().numel())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_equal_to_the_naive_evaluation(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eckart.measuring.divergence.CHUNK_ELEMENTS", 128 * 3 * 5)  # 5 positions at a time
    monkeypatch.setattr("eckart.maths.divergence.SLICE_ELEMENTS", 32 * 30)  # 30 of the vocabulary at a time
    two = partial(split_batches, batch_tokens=32)  # batches
    monkeypatch.setattr("eckart.measuring.sensitivity.split_batches", two)
    model, layout, made = setting(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"work": tmp_path, "depends": {}, "shares": SHARES}
    curves = measure_curves(model, layout, made.groups, made.cut, windows(), 0.6, **options)
    assert {n: torch.equal(v, before[n]) for n, v in model.state_dict().items()} == dict.fromkeys(before, True)
    assert curves.resting == pytest.approx(naive(family, {}), rel=1e-5)
    assert curves.losses.keys() == made.keys()
    for name in list(made)[::3]:
        assert sorted(curves.losses[name]) == [0.3, 0.6, 0.8, 1.0]
        for share, loss in curves.losses[name].items():
            assert loss == pytest.approx(naive(family, {name: share}), rel=1e-5), (name, share)


@torch.no_grad()
def test_a_capped_head_is_seen_and_compared_all_the_same() -> None:
    """Gemma 2 caps its logits, so they are not those of a linear head; a small cap changes every number."""
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}

    def run(model: Any, layout: Any) -> tuple[torch.Tensor, torch.Tensor]:
        last: list[torch.Tensor] = []
        final = model.get_submodule(layout.blocks)[-1]
        hook = final.register_forward_hook(lambda _block, _inputs, output: last.append(output))
        logits = model(windows()).logits.double().log_softmax(-1)
        hook.remove()
        return logits, last[0]

    for cap in (None, 1.0):
        model = tiny_model("Gemma2", **options, final_logit_softcapping=cap)
        layout = discover(model)
        residence = residence_of(model, layout)
        stream = open_stream(model, residence, [windows()])
        expected, final = run(model, layout)
        divergence = Divergence(model, residence, stream.branch([final], len(residence)))
        assert (divergence.head is None) == (cap is not None)
        model.get_submodule(layout.targets[-1].name).weight[:, ::2] = 0
        found, final = run(model, layout)
        kl = float((expected.exp() * (expected - found)).sum() / windows().numel())
        assert divergence(Store([final])) == pytest.approx(kl, rel=1e-5)


def test_a_second_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure("llama", tmp_path)
    monkeypatch.setattr("eckart.measuring.sensitivity.open_stream", None)  # without it nothing can run
    assert measure("llama", tmp_path) == first


@pytest.mark.parametrize("change", [{"target": 0.7}, {"depends": {"data": "other"}}])
def test_a_changed_option_starts_anew(change: dict[str, Any], tmp_path: Path) -> None:
    measure("llama", tmp_path, only=())
    measure("llama", tmp_path, only=(), **change)
    assert len(list(tmp_path.glob("sensitivity-*.jsonl"))) == 2


def test_more_shares_and_a_torn_line_reuse_what_is_there(tmp_path: Path) -> None:
    curves = measure("llama", tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert measure("llama", tmp_path, shares=(*SHARES, 0.5)).resting == curves.resting
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    measured = [(row["group"], row["share"]) for row in rows]
    assert len(measured) == len(set(measured)) == 14 * 4 + 1


@pytest.mark.parametrize("row", [{"group": [], "share": 1.0, "kl": 0.0}, {"group": "", "share": 0.6, "kl": "low"}])
def test_a_row_of_another_kind_is_no_measurement(row: Any, tmp_path: Path) -> None:
    """Journals of version 0.1 have no checksums, so a damaged row of one may be there; it is measured again."""
    curves = measure("llama", tmp_path / "whole")
    (path,) = (tmp_path / "whole").glob("*.jsonl")
    head = path.read_text().splitlines()[0]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / path.name).write_text(f"{head}\n{json.dumps(row)}\n")
    assert measure("llama", tmp_path / "old").resting == curves.resting


def test_killed_half_way_it_resumes_to_the_same_curves(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from test_sensitivity import measure
        def progress(stage, done, total):
            if done * 2 > total:
                os.kill(os.getpid(), signal.SIGKILL)
        measure("llama", Path(sys.argv[1]), progress=progress)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "killed"), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (path,) = (tmp_path / "killed").glob("*.jsonl")
    lines = path.read_text().splitlines()
    assert 1 < len(lines) < 14 * 3
    resumed, straight = measure("llama", tmp_path / "killed"), measure("llama", tmp_path / "straight")
    assert path.read_text().splitlines()[: len(lines)] == lines
    assert resumed == straight


def test_swapped_modules_come_back_after_an_error(tmp_path: Path) -> None:
    model, layout, made = setting("llama")
    before = dict(model.named_modules())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_curves(
            model, layout, made.groups, made.cut, windows(), 0.6, work=tmp_path, depends={}, shares=SHARES,
            progress=fail,
        )  # fmt: skip
    assert dict(model.named_modules()) == before
