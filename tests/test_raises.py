"""`scripts/raises` names the statements that a coverage report says were not reached, and no others."""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "eckart"


def said(tmp_path: Path, missing: dict[str, list[int]]) -> tuple[int, list[str]]:
    """Exit code and lines for a report in which these lines of these files were missed, and all others reached."""
    names = [path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")]
    files = {f"src/eckart/{name}": {"missing_lines": missing.get(name, [])} for name in names}
    (tmp_path / "coverage.json").write_text(json.dumps({"files": files}))
    command = [sys.executable, ROOT / "scripts" / "raises", tmp_path / "coverage.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_what_was_missed_is_named(tmp_path: Path) -> None:
    assert said(tmp_path, {}) == (0, ["Every raise was reached."])
    tree = ast.parse((SOURCE / "support" / "devices.py").read_text())
    first = min(node.lineno for node in ast.walk(tree) if isinstance(node, ast.Raise))
    code, (line,) = said(tmp_path, {"support/devices.py": [1, first], "support/lock.py": [1]})
    assert code == 1
    assert line.startswith(f'support/devices.py {first} raise OptionError(f"device is {{device!r}}, but must be cpu')
