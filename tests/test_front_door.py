"""The public names are true, the import is light, and imports point one way."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import eckart

SOURCE = Path(eckart.__file__).parent
ROOT = SOURCE.parents[1]


def test_public_names_are_sorted_and_exist():
    assert eckart.__all__ == sorted(eckart.__all__, key=lambda name: (not name[0].isupper(), name))
    for name in eckart.__all__:
        assert getattr(eckart, name) is not None
    assert len(eckart.__all__) <= 30
    assert sorted(eckart._HOME) == sorted(set(eckart.__all__) - {"__version__"})


def test_no_module_hides_a_public_name():
    """`import eckart.plan` would put the module where the function `eckart.plan` must be."""
    modules = {path.stem for path in SOURCE.glob("*.py")} | {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert not modules & set(eckart.__all__)
    importlib.import_module("eckart.pipeline")
    assert callable(eckart.plan)
    assert callable(eckart.compress)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eckart.nothing


LIGHT = """
import sys, torch
def forbidden(*args, **kwargs):
    raise AssertionError("touched a GPU at import")
torch.cuda.init = torch.cuda.current_device = torch.cuda._lazy_init = forbidden
import eckart
heavy = {"transformers", "datasets"} & set(sys.modules)
assert not heavy, heavy
eckart.compress, eckart.FactorizedLinear, eckart.Plan, eckart.evaluate, eckart.load, eckart.inspect
heavy = {"transformers", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_import_is_light():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_no_table_of_model_names():
    """Architectures are found by structure: no family is named in the code."""
    families = re.compile(r"\b(llama|mistral|qwen\w*|gemma\w*|phi3|opt|neox|bloom|falcon)\b", re.IGNORECASE)
    allowed = {"tiny.py", "demo"}
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            for text in names:
                if len(text) < 40:  # prose in docstrings may tell of families
                    assert not families.search(text), f"{path.name}: {text!r}"


def test_changelog_names_this_version():
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == eckart.__version__
