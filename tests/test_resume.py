"""Kill a run in the middle of a block, run it again: the same bytes; with other options: anew."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eckart
from eckart.errors import OutputError
from eckart.recipes import Recipe
from eckart.testing import tiny_model, tiny_tokenizer
from eckart.work import WorkFolder, fingerprint

TEXT = "A killed run resumes at its block and ends with the same checkpoint, byte for byte. " * 40
OPTIONS = {"steps": 6, "batch": 4, "check_every": 2, "rate": 3e-3}


@pytest.fixture
def folder(tmp_path):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    tiny_model("Llama", **options, num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def compress(folder, out, work, progress=lambda stage, done, total: None, **changes):
    recipe = Recipe("mine", "svd_llm", "uniform", ("block_collaborative",), {"block_collaborative": OPTIONS | changes})
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
    """Counts the steps of the descent, and ends the run at one of them."""

    def __init__(self, stop_at=None):
        self.steps, self.stop_at = [], stop_at

    def __call__(self, stage, done, total):
        if stage == "collaborate":
            self.steps.append(done)
            if done == self.stop_at:
                raise KeyboardInterrupt


def assert_same(one, two):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_run_stopped_in_block_2_resumes_there_with_the_same_bytes(folder):
    whole, stopped, resumed = Watch(), Watch(stop_at=2 * 6 + 3), Watch()
    compress(folder, "whole", None, whole)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, "resumed", "work", stopped)
    assert not (folder / "resumed").exists()
    assert len(list((folder / "work").glob("*/*.json"))) == 2
    compress(folder, "resumed", "work", resumed)
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
    key = fingerprint({"a": 1}, [("w", torch.zeros(3))])
    assert key == fingerprint({"a": 1}, [("w", torch.zeros(3))])
    for facts, tensor in (({"a": 2}, torch.zeros(3)), ({"a": 1}, torch.ones(3)), ({"a": 1}, torch.zeros(3, 1))):
        assert fingerprint(facts, [("w", tensor)]) != key
    work = WorkFolder(tmp_path, "stage", key)
    assert work.find("one") is None
    work.keep("one", {"w": torch.arange(3.0)}, {"loss": 0.1})
    tensors, notes = work.find("one")
    assert torch.equal(tensors["w"], torch.arange(3.0))
    assert notes == {"loss": 0.1}
    assert WorkFolder(tmp_path, "stage", fingerprint({"a": 2})).find("one") is None
    assert WorkFolder(None, "stage", key).find("one") is None
    next(tmp_path.glob("*/one.safetensors")).write_bytes(b"torn")
    with pytest.raises(OutputError, match="one cannot be read back"):
        work.find("one")
