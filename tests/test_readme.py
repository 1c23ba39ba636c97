"""What the README shows runs: its Python block, its commands' names, its file tree."""

import re
import shlex
from pathlib import Path

from eckart.testing import tiny_models, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_example(tmp_path, monkeypatch, capsys):
    model = tiny_models()["llama"]()
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "model-folder")
    tiny_tokenizer().save_pretrained(tmp_path / "model-folder")
    for name in ("corpus.txt", "other.txt"):
        (tmp_path / name).write_text("All work and no play makes a dull text. " * 600)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    keep, _, perplexity, dense = capsys.readouterr().out.split()
    assert float(keep) <= 0.8
    assert float(perplexity) > 1
    assert float(dense) > 1


def test_commands_parse(tmp_path, monkeypatch):
    """Every `eckart ...` line of the README is accepted by the parser (the work itself is not run)."""
    import typer

    from eckart._cli import app

    command = typer.main.get_command(app)
    lines = [
        line.split("#")[0]
        for line in re.findall(
            r"^(eckart (?:inspect|plan|compress|eval|report|compare|methods)\b.*)$", README, re.MULTILINE
        )
    ]
    assert len(lines) >= 6
    for line in lines:
        name, *arguments = shlex.split(line)[1:]
        sub = command.get_command(None, name)
        assert sub is not None, line
        sub.make_context(name, arguments)


def test_every_package_is_in_the_tree():
    tree = README[README.index("src/eckart/") :]
    for path in (ROOT / "src" / "eckart").glob("*/__init__.py"):
        assert f"{path.parent.name}/" in tree
