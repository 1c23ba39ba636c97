"""Names that no file or folder can have are refused in one line, wherever a command takes a name."""

import sys
from pathlib import Path

import pytest

import eckart
from eckart._cli import main
from eckart.testing import tiny_models, tiny_tokenizer

TEXT = ("--data", "text.txt", "--windows", "2", "--length", "16")
NAMES = {"too long": "x" * 300, "~ of nobody": "~nobody_of_this_name/m", "a circle of links": "circle", "NUL": "a\0b"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    eckart.compress(str(folder / "dense"), recipe="svd", keep=0.5, out=folder / "small")
    (folder / "text.txt").write_text("the cat sat on a mat " * 300)
    (folder / "circle").symlink_to("circle")
    return folder


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "NAME"),
        ("compress", "NAME", "--recipe", "svd", "--out", "out"),
        ("compress", "dense", "--recipe", "svd", "--out", "NAME/within"),
        ("compress", "dense", "--recipe", "svd", "--out", "out", "--tokenizer", "NAME"),
        ("compress", "dense", "--recipe", "svd", "--out", "out", "--plan", "NAME"),
        ("compress", "dense", "--recipe", "svd", "--out", "out", "--work", "NAME/within"),
        ("compress", "dense", "--recipe", "NAME.toml", "--out", "out"),
        ("compress", "dense", "--recipe", "svd-llm", "--out", "out", "--data", "NAME"),
        ("compress", "dense", "--recipe", "svd-llm", "--out", "out", "--data", "NAME.txt"),
        ("eval", "NAME", *TEXT),
        ("eval", "small", "--against", "NAME", *TEXT),
        ("eval", "small", "--tokenizer", "NAME", *TEXT),
        ("verify", "NAME"),
        ("report", "NAME"),
        ("report", "small", "--results", "NAME"),
        ("compare", "small", "NAME"),
        ("convert", "NAME", "--storage", "pair", "--out", "out"),
        ("export", "NAME", "--to", "merged", "--out", "out"),
        ("export", "small", "--to", "merged", "--out", "NAME/within"),
        ("demo", "--out", "NAME/within"),
    ],
    ids=" ".join,
)
def test_a_name_that_nothing_can_have(
    command: tuple[str, ...],
    name: str,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["eckart", *(word.replace("NAME", name) for word in command)])
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 2, said.err
    assert said.err.startswith("eckart: ")
    assert said.err.count("\n") == 1
    assert said.err[:-1].isprintable()
    assert said.out == ""
    assert not Path("out").exists()
