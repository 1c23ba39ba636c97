"""Wall time and peak memory of the whole `eckart compress`, each time in a fresh process; of two versions in turns.

    python benchmarks/memory_and_time.py MODEL CALIBRATION.txt --recipes svd-llm eckart --repeats 3
    python benchmarks/memory_and_time.py MODEL CALIBRATION.txt --source before=OTHER/src --source after=src

Calibrates on the first 32 windows of 512 tokens and keeps 0.8. Peak memory is the most that the process has been
resident with, above the bytes of the model. A source is a folder with the package, which comes first on the path of
the process; several take turns (A B A B), and what is printed of the others is the median of their ratios to the
first, turn by turn. Rows are written as they come; a second run measures only what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from _common import LENGTH, WINDOWS, read_report, write_report

KEEP = 0.8
# The process says itself what it held: what its parent is told starts at what the parent holds.
ENTER = """
import json, sys
from pathlib import Path
import eckart
from eckart._cli import main
said, sys.argv = Path(sys.argv[1]), ["eckart", *sys.argv[2:]]
try:
    main()
finally:
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    said.write_text(json.dumps({"peak_bytes": peak, "package": eckart.__file__}))
"""


def measure(recipe: str, source: Path | None, model: str, calibration: str) -> dict[str, Any]:
    """One whole compression, start of Python to saved folder."""
    path = os.environ.get("PYTHONPATH", "") if source is None else str(source.resolve())
    with tempfile.TemporaryDirectory() as folder:
        command = ["compress", model, "--recipe", recipe, "--keep", str(KEEP), "--data", calibration, "--json"]
        command += ["--windows", str(WINDOWS), "--length", str(LENGTH), "--out", f"{folder}/out"]
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", ENTER, f"{folder}/said", *command],
            check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        wall = time.perf_counter() - start
        said, found = json.loads(Path(f"{folder}/said").read_text()), json.loads(run.stdout)
    if source is not None and source.resolve() not in Path(said["package"]).resolve().parents:
        raise SystemExit(f"{source}: holds no package eckart; the one that ran is {said['package']}")
    model_bytes = found["ledger"]["model_bytes_dense"]
    return {
        "seconds": round(wall, 2),
        "stages": {stage: round(value, 2) for stage, value in found["seconds"].items()},
        "model_bytes": model_bytes,
        "peak_minus_model_bytes": said["peak_bytes"] - model_bytes,
        "load_average": os.getloadavg()[0],
    }


def show(recipe: str, of_sources: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of every source, and of its ratios to the first one."""
    first = next(iter(of_sources.values()))
    for label, runs in of_sources.items():
        seconds, peak = (median(run[key] for run in runs) for key in ("seconds", "peak_minus_model_bytes"))
        line = f"{recipe}, {label}: {seconds:.1f} s, {peak / 1e9:.3f} GB above the model"
        if runs is not first:
            pairs = list(zip(runs, first, strict=False))
            ratios = [median(a[key] / b[key] for a, b in pairs) for key in ("seconds", "peak_minus_model_bytes")]
            line += f"; time {ratios[0]:.3f}, memory {ratios[1]:.3f} of {next(iter(of_sources))}"
        print(f"{line} ({len(runs)} runs)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_and_time.json"))
    parser.add_argument("--recipes", nargs="+", default=["svd-llm", "eckart"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--source", action="append", metavar="[LABEL=]DIR", help="without one: what is on the path")
    given = parser.parse_args()
    sources: dict[str, Path | None] = {"on the path": None}
    if given.source:
        named = (pair.rpartition("=") for pair in given.source)
        sources = {label or folder: Path(folder) for label, _, folder in named}
    report = {**read_report(given.out), "keep": KEEP, "windows": [WINDOWS, LENGTH]}
    for recipe in given.recipes:
        rows = report["rows"].setdefault(recipe, {})
        for turn in range(given.repeats):
            for label, source in sources.items():
                if len(rows.setdefault(label, [])) <= turn:
                    rows[label].append(measure(recipe, source, given.model, given.calibration))
                    print(recipe, label, json.dumps(rows[label][-1]), flush=True)
                    write_report(given.out, report)
        show(recipe, {label: rows[label] for label in sources})


if __name__ == "__main__":
    main()
