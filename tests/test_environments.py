"""What `scripts/setup` installs is pinned, and the pins are fit for any machine."""

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "constraints-lock.txt").read_text().splitlines() if not line.startswith("#")]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


LOCK = {plain(line.partition("==")[0]): line.partition("==")[2] for line in LINES}


def test_the_lock_holds_plain_versions():
    """No path, no address and no build of one machine, such as torch's +cpu."""
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert "torch" not in LOCK


def test_everything_that_pyproject_names_is_locked():
    needs = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    names = {plain(re.match(r"[\w.-]+", need)[0]) for need in needs} - {"eckart", "torch"}
    assert names <= set(LOCK), "run: scripts/test-versions lock"
    assert {"pip", "hatchling", "setuptools"} <= set(LOCK)  # they install and build
