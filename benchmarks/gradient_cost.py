"""What gradient statistics cost, in plain forward passes over the same tokens.

    python benchmarks/gradient_cost.py MODEL CALIBRATION.txt --out benchmarks/results/gradient_cost.json

Interleaved repeats in one process: a plain forward pass over 8 windows of 512 tokens (head
included), the sweep of input Grams, and the sweep of input and gradient Grams. Processor time (user
and system, all threads) stands beside wall time, since it does not count what other processes take.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _common import write_report

from eckart.checkpoints import checkpoint
from eckart.model.discovery import discover
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.text.data import load_windows

WINDOWS, LENGTH = 8, 512


def timed(work) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


@torch.no_grad()
def forward(model, ids) -> None:
    for batch in ids.split(4):
        model(input_ids=batch, use_cache=False)


def over_forward(rows: dict, kind: str) -> dict[str, float]:
    medians = {name: statistics.median(run[kind] for run in runs) for name, runs in rows.items()}
    return {name: median / medians["forward"] for name, median in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gradient_cost.json"))
    given = parser.parse_args()
    model, tokenizer = checkpoint.load_model(given.model), checkpoint.load_tokenizer(given.model)
    ids = load_windows(given.calibration, tokenizer, windows=WINDOWS, length=LENGTH).ids
    layout = discover(model)
    works = {
        "forward": lambda: forward(model, ids),
        "input_grams": lambda: [None for _ in sweep(model, layout, ids, [Need.SMALLER_GRAM])],
        "input_and_gradient_grams": lambda: [
            None for _ in sweep(model, layout, ids, [Need.SMALLER_GRAM, Need.GRADIENT_GRAM])
        ],
    }
    forward(model, ids[:1])
    rows: dict[str, list[dict]] = {name: [] for name in works}
    for _ in range(given.repeats):
        for name, work in works.items():
            rows[name].append(timed(work))
            print(name, rows[name][-1], flush=True)
        ratios = {f"{kind}_over_forward": over_forward(rows, kind) for kind in ("seconds", "cpu_seconds")}
        report = {"tokens": ids.numel(), "threads": torch.get_num_threads(), **ratios, "runs": rows}
        write_report(given.out, report)
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    main()
