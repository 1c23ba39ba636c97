"""`eckart verify`: every file that decides what a model computes is known by its hash."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import eckart
from eckart._cli import main
from eckart.checkpoints import checkpoint
from eckart.errors import CheckpointError
from eckart.portable.hashes import check_hashes

Make = Callable[..., Any]
DECIDING = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "hf.py")


@pytest.fixture
def folder(make: Make, tokenizer: Any, tmp_path: Path) -> Path:
    checkpoint.save(make("llama"), tmp_path / "saved", tokenizer=tokenizer, provenance={"recipe": {"name": "by hand"}})
    return tmp_path / "saved"


def test_a_saved_checkpoint_is_whole(folder: Path) -> None:
    found = eckart.verify(folder)
    assert found.whole
    assert {file.file for file in found.files} >= {*DECIDING, "model.safetensors"}
    assert {file.state for file in found.files} == {"as saved"}


@pytest.mark.parametrize("name", DECIDING)
def test_an_edited_file_is_found_on_loading(name: str, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b" \n")
    with pytest.raises(CheckpointError, match=rf"{name}: is not what was saved.*--accept"):
        eckart.load(folder)
    found = eckart.verify(folder)
    assert [file.file for file in found.files if file.state == "changed"] == [name]
    assert not found.whole


def test_another_epsilon_is_not_the_model(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    with pytest.raises(CheckpointError, match=r"config\.json: is not what was saved"):
        eckart.load(folder)


def test_the_card_is_free_and_so_is_what_people_add(folder: Path) -> None:
    (folder / "README.md").write_text("ours")
    (folder / "notes.txt").write_text("mine")
    assert eckart.load(folder)
    found = eckart.verify(folder)
    assert found.whole
    assert [(file.file, file.state) for file in found.files if file.state != "as saved"] == [
        ("notes.txt", "not recorded")
    ]


def test_a_file_that_is_gone_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert eckart.load(folder)  # the model needs it not
    assert [(file.file, file.state) for file in eckart.verify(folder).files if file.state != "as saved"] == [
        ("tokenizer.json", "missing")
    ]


def test_what_was_trained_in_its_own_folder_can_be_accepted(folder: Path, ids: Any) -> None:
    model = eckart.load(folder)
    model.model.norm.weight.data.mul_(1.01)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"is not what was saved.*eckart verify .* --accept"):
        eckart.load(folder)
    assert eckart.verify(folder, accept=True).accepted
    assert (eckart.load(folder)(ids).logits == model(ids).logits).all()
    assert eckart.verify(folder).whole
    (accepted,) = json.loads((folder / "provenance.json").read_text())["accepted"]
    assert "model.safetensors" in accepted


def test_what_contradicts_itself_cannot_be_accepted(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.0.mlp.up_proj.basis.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    before = (folder / "provenance.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"up_proj\.basis\.weight: is missing"):
        eckart.verify(folder, accept=True)
    assert (folder / "provenance.json").read_bytes() == before


def test_an_old_record_of_weights_alone_is_enough(folder: Path) -> None:
    path = folder / "provenance.json"
    data = json.loads(path.read_text())
    data["files"] = {"model.safetensors": data["files"]["model.safetensors"]}
    path.write_text(json.dumps(data))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert eckart.load(folder)
    assert eckart.verify(folder).whole


def test_a_folder_without_a_record(folder: Path, tmp_path: Path) -> None:
    (folder / "provenance.json").unlink()
    with pytest.raises(CheckpointError, match="records no files"):
        eckart.verify(folder)
    assert eckart.verify(folder, accept=True).whole
    assert eckart.verify(folder).whole
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(CheckpointError):
        eckart.verify(folder)


def test_the_plain_road_can_ask_for_it(folder: Path, ids: Any) -> None:
    import transformers

    from eckart.portable.hf import EckartConfig

    def opened(**options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)

    asked = {"quantization_config": EckartConfig(verify=True)}
    with pytest.warns(UserWarning, match="already"):
        model = opened(**asked)
    assert "verify" not in model.config.to_dict()["quantization_config"]
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    assert opened() is not None  # nobody asked
    with (
        pytest.warns(UserWarning, match="already"),
        pytest.raises(ValueError, match=r"config\.json: is not what was saved"),
    ):
        opened(**asked)
    (folder / "provenance.json").unlink()
    with pytest.warns(UserWarning, match="already"), pytest.raises(ValueError, match="records no files"):
        opened(**asked)


def test_a_wish_is_no_configuration(folder: Path) -> None:
    import transformers

    from eckart.portable.hf import EckartConfig
    from eckart.testing import tiny_models

    with pytest.raises(ValueError, match="at least one layer"):
        EckartConfig()
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    with pytest.raises(ValueError):  # noqa: PT011  transformers says that a dense model is not quantised by naming us
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=EckartConfig(verify=True)
        )


def test_a_tokenizer_that_was_edited_is_refused_before_it_reads(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"pad_token": "<pad>"', '"pad_token": "<s>"'))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is not what was saved"):
        checkpoint.load_tokenizer(folder)


def test_the_command_says_how_many_and_which(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "hf.py"):
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    monkeypatch.setattr(sys, "argv", ["eckart", "verify", str(folder), "--json"])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.err.startswith(f"eckart: {folder}: config.json and 1 more of ")
    assert said.err.endswith(f"eckart verify {folder} --accept\n")
    assert said.err.count("\n") == 1
    assert json.loads(said.out)["whole"] is False


def test_weight_files_are_of_one_folder_and_in_its_record(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^verify=True needs weight files in one folder\.$"):
        check_hashes([folder / "model.safetensors", tmp_path / "model.safetensors"])
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: is not recorded in provenance\.json\.$"):
        check_hashes([folder / "model.safetensors", folder / "other.safetensors"])
