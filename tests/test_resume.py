"""Kill a run in the middle of a block, run it again: the same bytes; with other options: anew."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eckart
from eckart.recipes import Recipe
from eckart.support.work import Key, WorkFolder
from eckart.testing import tiny_model, tiny_tokenizer

TEXT = "A killed run resumes at its block and ends with the same checkpoint, byte for byte. " * 40
OPTIONS = {"steps": 6, "batch": 4, "check_every": 2, "rate": 3e-3}
FOUND = {"form": "free", "start": "found", "free_steps": 6, "free_rate": 3e-3}
WEIGHED = {**FOUND, "metric": "gradient"}


@pytest.fixture
def folder(tmp_path):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    tiny_model("Llama", **options, num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def compress(folder, out, work, progress=lambda stage, done, total: None, refiner="block_collaborative", **changes):
    options = {refiner: {**(OPTIONS if refiner == "block_collaborative" else {}), **changes}}
    recipe = Recipe("mine", "svd_llm", "uniform", (refiner,), options)
    return eckart.compress(
        str(folder / "dense"),
        recipe=recipe,
        keep=0.6,
        calibration=eckart.Calibration(str(folder / "text.txt"), windows=12, length=16),
        out=folder / out,
        work=None if work is None else folder / work,
        progress=progress,
    )


class Watch:
    """Counts the steps of the descent, or of another stage, and ends the run at one of them."""

    def __init__(self, stop_at=None, stage="collaborate"):
        self.steps, self.stop_at, self.stage = [], stop_at, stage

    def __call__(self, stage, done, total):
        if stage == self.stage:
            self.steps.append(done)
            if done == self.stop_at:
                raise KeyboardInterrupt


def assert_same(one, two):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize("options", [{}, WEIGHED], ids=["tied", "weighed"])
def test_a_run_stopped_in_block_2_resumes_there_with_the_same_bytes(folder, options):
    whole, stopped, resumed = Watch(), Watch(stop_at=2 * 6 + 3), Watch()
    compress(folder, "whole", None, whole, **options)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, "resumed", "work", stopped, **options)
    assert not (folder / "resumed").exists()
    assert len(list((folder / "work").glob("*/*.json"))) == 2
    compress(folder, "resumed", "work", resumed, **options)
    assert whole.steps[:12] == list(range(1, 13))
    assert resumed.steps == whole.steps[12:]  # block 2 from its first step, nothing before
    assert_same(folder / "whole", folder / "resumed")


def test_changed_options_start_anew_beside_the_old_work(folder):
    compress(folder, "one", "work")
    again, other = Watch(), Watch()
    compress(folder, "again", "work", again)
    compress(folder, "other", "work", other, rate=1e-3)
    assert again.steps == []
    assert len(other.steps) == 24
    assert len(list((folder / "work").iterdir())) == 2
    assert_same(folder / "one", folder / "again")


def test_start_metric_and_shrinkage_are_part_of_what_the_work_depends_on(folder):
    variants = ({"form": "free", "free_steps": 6}, FOUND, WEIGHED, {**WEIGHED, "gradient_shrinkage": 0.3})
    for number, options in enumerate(variants, 1):
        compress(folder, f"out-{number}", "work", **options)
        assert len(list((folder / "work").iterdir())) == number
    weights = {(folder / f"out-{number}" / "model.safetensors").read_bytes() for number in range(1, 5)}
    assert len(weights) == 4


@pytest.mark.parametrize(
    ("refiner", "stage", "closed_form"),
    [("alternating", "alternate", "regress"), ("sequential_update", "update", "coefficient_change")],
)
def test_refiners_without_gradients_resume_at_their_block(folder, monkeypatch, refiner, stage, closed_form):
    module, calls = importlib.import_module(f"eckart.refiners.{refiner}"), []
    original = getattr(module, closed_form)
    monkeypatch.setattr(module, closed_form, lambda *args: calls.append(1) or original(*args))
    made = compress(folder, "whole", None, refiner=refiner)
    whole = len(calls)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, "resumed", "work", Watch(stop_at=3, stage=stage), refiner=refiner)
    assert len(calls) == whole + whole * 3 // 4
    assert len(list((folder / "work").glob("*/*.json"))) == 3
    resumed = compress(folder, "resumed", "work", refiner=refiner)
    assert len(calls) == 2 * whole  # three blocks before, one after
    assert resumed.provenance.get("refinement") == made.provenance.get("refinement")
    assert_same(folder / "whole", folder / "resumed")
    compress(folder, "other", "work", refiner=refiner, damping=1e-4)
    assert len(calls) == 3 * whole
    assert len(list((folder / "work").iterdir())) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_resume import compress
def progress(stage, done, total):
    if stage == "collaborate" and done == 6 + 4:
        os.kill(os.getpid(), signal.SIGKILL)
compress(Path(sys.argv[1]), "killed", "work", progress)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_leaves_work_that_resumes(folder):
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder), here], env=environment, check=False)
    assert run.returncode == -signal.SIGKILL
    resumed = Watch()
    compress(folder, "killed", "work", resumed)
    assert resumed.steps[0] == 7
    compress(folder, "whole", None)
    assert_same(folder / "whole", folder / "killed")


def test_provenance_holds_how_each_block_went(folder):
    made = compress(folder, "whole", None)
    notes = made.provenance["refinement"]
    assert [note["block"] for note in notes] == [0, 1, 2, 3]
    assert all(note["reached"] > 0 for note in notes)


def test_work_folder(tmp_path):
    key = Key("stage", a=1, w=torch.zeros(3))
    assert (key.digest, key.name) == (Key("stage", a=1, w=torch.zeros(3)).digest, f"stage-{key.digest[:16]}")
    for a, tensor in ((2, torch.zeros(3)), (1, torch.ones(3)), (1, torch.zeros(3, 1))):
        assert Key("stage", a=a, w=tensor).digest != key.digest
    work = WorkFolder(tmp_path, key)
    assert work.find("one") is None
    work.write("one", {"w": torch.arange(3.0)}, {"loss": 0.1})
    tensors, notes = work.find("one")
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert notes == {"loss": 0.1}
    assert WorkFolder(tmp_path, Key("stage", a=2)).find("one") is None
    assert WorkFolder(None, key).find("one") is None
    next(tmp_path.glob("*/one.safetensors")).write_bytes(b"torn")
    assert work.find("one") is None  # made again
