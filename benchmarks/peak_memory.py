"""Peak memory of the recipes that search or train for long, by short runs of the whole command.

    python benchmarks/peak_memory.py MODEL CALIBRATION.txt

The protocol of `recipes.py` at 0.8, with fewer shares, steps and candidates than the tables' runs: those cost time, not
memory. The size of a batch is that of the tables. Rows are written as they come.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import read_report, write_report

from eckart.checkpoints import checkpoint

SENSITIVITY = {"allocator.measured": "0.5,1", "allocator.windows": "4", "allocator.length": "128"}
COLLABORATION = {"block_collaborative.steps": "5", "block_collaborative.batch": "4"}
RECOVERY = {"recover.epochs": "1", "recover.written": "16"}
RECIPES = {  # name of a row: recipe, its options
    "duo-svd": ("duo-svd", SENSITIVITY),
    "duo-svd, compensated": ("duo-svd", {**SENSITIVITY, "factorizer.compensated": "true"}),
    "lc-svd-fixed": ("lc-svd-fixed", COLLABORATION),
    "lc-svd": (
        "lc-svd",
        {**COLLABORATION, "allocator.candidates": "4", "allocator.windows": "4", "allocator.held_out": "4"},
    ),
    "eckart --recover": ("eckart", {"allocator.correction": "cheap", "refiners": "recover", **RECOVERY}),
}


def peak_of(recipe: str, options: dict[str, str], model: str, calibration: str) -> int:
    """Bytes of memory that the command has at most."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "eckart", "compress", model, "--recipe", recipe, "--keep", "0.8"]
        command += ["--data", calibration, "--windows", "32", "--length", "512", "--out", f"{folder}/out"]
        command += [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{recipe}: the command failed, see above")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peak_memory.json"))
    arguments = parser.parse_args()
    model_bytes = sum(p.nbytes for p in checkpoint.load_model(arguments.model).parameters())
    report = read_report(arguments.out)
    for name, (recipe, options) in RECIPES.items():
        if name not in report["rows"]:
            peak = peak_of(recipe, options, arguments.model, arguments.calibration)
            report["rows"][name] = {"options": options, "peak_minus_model_bytes": peak - model_bytes}
            print(name, report["rows"][name], flush=True)
            write_report(arguments.out, report)


if __name__ == "__main__":
    main()
