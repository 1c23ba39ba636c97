"""What the documentation shows runs: the tutorial, the methods of one's own, and the links between the pages."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import eckart
from eckart._cli import main
from eckart.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def blocks(page):
    """`(language, title or "", text)` of every fenced block of a page, in order."""
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the model and the texts that the pages name."""
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    model = tiny_model("Llama", **options, num_hidden_layers=4, max_position_embeddings=256)
    model.save_pretrained(tmp_path / "my-model")
    tiny_tokenizer().save_pretrained(tmp_path / "my-model")
    for number, name in enumerate(("calibration.txt", "other.txt", "corpus.txt")):
        (tmp_path / name).write_text(f"The {number + 1}. text is not a good one, but it is long enough. " * 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in ("root_mean_square", "ends_dense", "same_energy"):
        sys.modules.pop(name, None)


def run_line(line, monkeypatch, capsys):
    """Run one `eckart` line of a page in this process; `> FILE` takes standard output."""
    words, target = shlex.split(line), None
    if ">" in words:
        target, words = words[-1], words[:-2]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr()
    assert caught.value.code == 0, f"{line}: {said.err}"
    if target:
        Path(target).write_text(said.out)


def test_the_tutorial(workspace, monkeypatch, capsys):
    scope: dict[str, object] = {}
    ran = 0
    for language, _, text in blocks("tutorial.md"):
        if language == "bash":
            for line in text.splitlines():
                run_line(line, monkeypatch, capsys)
                ran += 1
        else:
            assert language == "python"
            exec(compile(text, "tutorial.md", "exec"), scope)
    assert ran >= 9
    assert (workspace / "smaller" / "report.html").exists()
    assert "<svg" in (workspace / "compare.html").read_text()
    names = [e.targets[0] for e in eckart.Plan.load("smaller/plan.json").entries]
    edited = {e.targets[0]: e.rank for e in eckart.Plan.load("edited/plan.json").entries}
    assert edited[names[0]] is None
    smaller, ordinary = eckart.load("smaller"), eckart.checkpoints.checkpoint.load_model("ordinary")
    ids = torch.arange(4, 30)[None]
    torch.testing.assert_close(ordinary(ids).logits, smaller(ids).logits, atol=1e-4, rtol=1e-3)


def test_methods_of_your_own(workspace, monkeypatch, capsys):
    scope: dict[str, object] = {}
    files = 0
    for language, title, text in blocks("add-a-method.md"):
        if title:
            (workspace / title).write_text(text)
            files += 1
        elif language == "python":
            exec(compile(text, "add-a-method.md", "exec"), scope)
        else:
            text = text.replace("MODEL", "my-model --data corpus.txt --windows 8 --length 64").replace(
                "DIR", "by-command"
            )
            run_line(text, monkeypatch, capsys)
    assert files == 4
    assert 0.7 < scope["made"].ledger.keep <= 0.8
    made = scope["made"].plan.entries
    assert {e.rank is None for e in made if ".layers.0." in e.name or ".layers.3." in e.name} == {True}
    line = (
        "eckart compress my-model --recipe mine.toml --keep 0.8 --data corpus.txt --windows 8 --length 64 --out by-file"
    )
    run_line(line, monkeypatch, capsys)
    assert [e.rank for e in eckart.Plan.load("by-file/plan.json").entries] == [e.rank for e in made]


def test_the_navigation_and_the_links_lead_somewhere():
    listed = re.findall(r":\s*([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed)) >= 12
    pages = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if "decisions" not in p.parts}
    assert pages == set(listed), "a page that the navigation does not name, or the other way round"
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", (DOCS / page).read_text(encoding="utf-8")):
            assert "://" in link or (DOCS / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_recipes_of_the_page_are_those_there_are():
    from eckart.recipes import BUILT_IN

    page = (DOCS / "choose-a-recipe.md").read_text()
    table = page[page.index("## How they differ") :]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == set(BUILT_IN)


def test_messages_that_troubleshooting_quotes_are_messages():
    """A quoted message that the code no longer says would send nobody to the page."""
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    words = re.compile(r"[a-z]{3,}")
    for quoted in re.findall(r"^\*\*`(.+?)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE):
        if quoted.startswith("Dataset scripts"):  # of another library
            continue
        parts = [part.strip(" ,:;'") for part in re.split(r"\.\.\.|\bN\b|[\d.]{3,}|\bnan\b|'eckart'", quoted)]
        longest = max(parts, key=len)
        assert words.search(longest)
        assert longest in re.sub(r'"\s*\n\s*f?"', "", source), f"{quoted!r}: nothing in the code says {longest!r}"


def test_the_page_of_commands_is_what_the_commands_say():
    """`scripts/cli-page` writes docs/cli.md."""
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "cli-page"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert (DOCS / "cli.md").read_text() == made.stdout, "run: scripts/cli-page > docs/cli.md"


def test_the_check_builds_the_site_with_what_the_extra_brings():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(requirement.startswith("zensical") for requirement in extras["docs"])
    assert any(re.fullmatch(r"eckart\[.*\bdocs\b.*\]", requirement) for requirement in extras["dev"])
    assert "zensical build --strict" in (ROOT / "scripts" / "check").read_text()
