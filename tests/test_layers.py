"""Imports point down: every file, lazy and type-checking imports included; and no circle of modules."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import eckart

SOURCE = Path(eckart.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# From the ground up. Each may import what stands before it, and itself. `docs/architecture.md` says why.
LAYERS = (
    "errors types version",
    "progress linalg",
    "support maths",
    "registry storages",
    "portable ledger",
    "model",
    "statistics plans text",
    "checkpoints",
    "factorizers allocators measuring",
    "refiners",
    "recipes",
    "planning",
    "run",
    "pipeline evaluation engines",
    "timing pages inspection tiny",
    "checks demo",
    "testing moved",
    "__init__",
    "_cli",
    "__main__",
)
RANK = {unit: number for number, units in enumerate(LAYERS) for unit in units.split()}


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = ("eckart", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file names in an import, wherever it stands, with the line."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "eckart")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            if base.split(".")[0] == "eckart":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield (inner if inner in MODULES else base), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = node.args[0]
            if isinstance(named, ast.Constant) and str(named.value).startswith("eckart."):
                yield str(named.value), node.lineno


def known(name: str) -> str | None:
    """The module or package that a dotted name begins with."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    here = unit_of(path)
    assert here in RANK, f"{here} has no place in LAYERS; give it one"
    for name, line in imported(path):
        module = known(name)
        # In a checkpoint `storages` is a file beside the portable ones.
        assert module is not None or name == "eckart.portable.storages", f"{path}:{line}: no module {name}"
        if module is None:
            continue
        there = "__init__" if module == "eckart" else module.split(".")[1]
        said = f"{path.relative_to(SOURCE.parent)}:{line}: {path.read_text().splitlines()[line - 1].strip()}"
        assert there == here or RANK[there] < RANK[here], f"{said}\n  {here} stands below {there}, or beside it"


def test_every_place_is_taken():
    assert set(RANK) == {unit_of(path) for path in FILES}


def test_no_circle_of_modules():
    graph = {m: {known(n) for n, _ in imported(p)} - {None, m, "eckart"} for m, p in MODULES.items() if m != "eckart"}
    state: dict[str, int] = {}

    def visit(module: str, trail: list[str]) -> None:
        state[module] = 1
        for other in sorted(graph.get(module, ())):
            package = MODULES[other].name == "__init__.py" and module.startswith(f"{other}.")
            assert state.get(other) != 1 or package, f"a circle: {' -> '.join([*trail, module, other])}"
            if other not in state:
                visit(other, [*trail, module])
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module, [])


def test_the_hall_is_small():
    """At most twenty files at the root of the package: everything else has a room."""
    assert len([path for path in SOURCE.iterdir() if path.is_file()]) <= 20


def test_every_package_says_what_it_is():
    for path in SOURCE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
