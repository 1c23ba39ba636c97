"""`eckart bench` on several checkpoints, cell by cell: the numbers of the README's table of speed.

    python benchmarks/bench.py DENSE 0.6-pivoted=DIR 0.6-pair=DIR2 --threads 1 --batch 1 --batch 8

A cell is one checkpoint, engine, dtype, number of threads and batch; a cell that is in the file is measured again
only with `--again`, so that the script can be stopped, and run for one cell at a time on a machine that is quiet for
a minute only. Long prompts at large batches take minutes on a CPU, hence the protocol below.
"""

import argparse
import json
from pathlib import Path

import eckart
from eckart.support.files import write_text

PROTOCOL = {1: (128, 7), 8: (128, 3), 64: (16, 3)}  # batch: tokens of the prompt, turns of each model
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("models", nargs="+", metavar="LABEL=DIR")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench.json"))
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--batch", type=int, action="append", choices=sorted(PROTOCOL))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--graphs", type=Path, help="with --int8: where exported graphs are kept")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--note", default="", help="how the machine was while it ran")
    given = parser.parse_args()
    for threads in given.threads or [1]:
        for label, folder in (pair.split("=", 1) for pair in given.models):
            for batch in given.batch or sorted(PROTOCOL):
                cell(given, label, folder, threads, batch)


def cell(given: argparse.Namespace, label: str, folder: str, threads: int, batch: int) -> None:
    """Measure one cell unless it is there, and write the file."""
    report = json.loads(given.out.read_text()) if given.out.exists() else {"cells": {}}
    kind = "int8" if given.int8 else given.dtype
    key = f"{label} {kind} threads={threads} batch={batch}"
    if key in report["cells"] and not given.again:
        return
    prompt, repeats = PROTOCOL[batch]
    made = eckart.bench(
        folder, against=given.dense, batches=(batch,), prompt=prompt, steps=STEPS, repeats=repeats, threads=threads,
        dtype="auto" if given.int8 else given.dtype, int8=given.int8,
        graphs=given.graphs and given.graphs / label, memory=batch == 8,
    )  # fmt: skip
    made |= {"label": label, "kind": kind, "note": given.note, "model": Path(folder).name, "against": "dense"}
    report["cells"][key] = made
    write_text(given.out, json.dumps(report, indent=1) + "\n")
    (row,) = made["rows"]
    for phase in ("prefill", "decode"):
        found = row[phase]
        print(f"{key} {phase}: {found['speedup']:.3f} of {found['limit']:.3f} = {found['of_limit']:.0%}", flush=True)


if __name__ == "__main__":
    main()
