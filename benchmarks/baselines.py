"""svd, asvd, fwsvd and svd-llm with uniform ranks, and what the run costs.

    python benchmarks/baselines.py MODEL CALIBRATION.txt TEST.txt --out benchmarks/results/baselines.json

Calibrates on the first 32 windows of 512 tokens, measures on the first 8 windows of 512 of the test text.
One decomposition of each recipe serves both shares. Then, in a fresh process each: the wall time of
the whole `eckart compress --recipe svd-llm` beside one plain forward pass over the same tokens, and
peak memory. Rows are written as they come; a second run measures only what is missing.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import LENGTH, TEST_WINDOWS, WINDOWS, Bench, named, read_report, write_report

from eckart import recipes
from eckart.checkpoints import checkpoint
from eckart.measuring.perplexity import perplexity
from eckart.planning.goals import Goal
from eckart.text.data import load_windows

RECIPES = ("svd", "asvd", "fwsvd", "svd-llm")
KEEPS = (0.8, 0.6)
ENTER = "import sys; from eckart._cli import main; sys.argv = ['eckart', *sys.argv[1:]]; main()"


def measure_recipes(model_path: str, calibration: str, test: str, report: dict, out: Path) -> None:
    """Fill report["perplexity"] with one row for each recipe and share."""
    rows = report["perplexity"]
    if all(f"{recipe} {keep}" in rows for recipe in RECIPES for keep in KEEPS):
        return
    bench = Bench(model_path, calibration)
    tests = load_windows(test, bench.tokenizer, windows=TEST_WINDOWS, length=LENGTH, purpose="evaluation")
    report["data"] = {"calibration": named(bench.text.read()), "test": named(tests)}
    rows["dense"] = {"perplexity": perplexity(bench.model, list(tests.ids)).value}
    for name in RECIPES:
        recipe = recipes.find(name, {"allocator": "uniform"})
        start = time.perf_counter()
        bench.decompose(recipe)
        seconds = time.perf_counter() - start
        for keep in KEEPS:
            plan = bench.plan(recipe, Goal(keep)).plan
            with bench.in_place(plan):
                rows[f"{name} {keep}"] = {
                    "perplexity": perplexity(bench.model, list(tests.ids)).value,
                    "keep_reached": plan.reached["keep"],
                    "recipe": recipe.to_dict(),
                    "seconds_decompose": round(seconds, 1),
                }
            print(name, keep, rows[f"{name} {keep}"]["perplexity"], flush=True)
            write_report(out, report)


def measure_cost(model_path: str, calibration: str, report: dict, out: Path, repeats: int) -> None:
    """Wall time of a whole compression over one plain forward pass, interleaved; peak memory of both."""
    rows = report.setdefault("cost", {}).setdefault("runs", [])
    while len(rows) < repeats:
        forward = in_fresh_process(["forward", model_path, calibration])
        with tempfile.TemporaryDirectory() as folder:
            options = ["--recipe", "svd-llm", "--keep", "0.8", "--data", calibration, "--windows", str(WINDOWS)]
            argv = ["compress", model_path, *options, "--length", str(LENGTH), "--out", f"{folder}/out", "--json"]
            start = time.perf_counter()
            run = subprocess.run([sys.executable, "-c", ENTER, *argv], check=True, capture_output=True, text=True)
            wall = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        stages = {k: round(v, 2) for k, v in json.loads(run.stdout)["seconds"].items()}
        rows.append(
            {
                "forward_seconds": forward["seconds"],
                "compress_seconds": round(wall, 2),
                "compress_over_forward": round(wall / forward["seconds"], 3),
                "stages": stages,
                "peak_bytes_any_child": peak,
                "model_bytes": forward["model_bytes"],
                "peak_minus_model_bytes": peak - forward["model_bytes"],
            }
        )
        print(rows[-1], flush=True)
        write_report(out, report)


def forward_pass(model_path: str, calibration: str) -> None:
    """One plain forward pass over the calibration tokens, timed after a warm-up window."""
    model, tokenizer = checkpoint.load_model(model_path), checkpoint.load_tokenizer(model_path)
    ids = load_windows(calibration, tokenizer, windows=WINDOWS, length=LENGTH).ids
    with torch.inference_mode():
        model(input_ids=ids[:1], use_cache=False)
        start = time.perf_counter()
        for batch in ids.split(4):
            model(input_ids=batch, use_cache=False)
        seconds = time.perf_counter() - start
    size = sum(p.nbytes for p in model.parameters())
    print(json.dumps({"seconds": round(seconds, 2), "model_bytes": size}))


def in_fresh_process(argv: list[str]) -> dict:
    done = subprocess.run([sys.executable, __file__, *argv], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["forward"]:
        forward_pass(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/baselines.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-cost", action="store_true")
    given = parser.parse_args()
    report = read_report(given.out, "perplexity")
    measure_recipes(given.model, given.calibration, given.test, report, given.out)
    if not given.skip_cost:
        measure_cost(given.model, given.calibration, report, given.out, given.repeats)


if __name__ == "__main__":
    main()
