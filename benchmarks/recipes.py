"""Every recipe under one protocol: perplexity and KL on two corpora, predicted KL, time, memory.

    python benchmarks/recipes.py MODEL CALIBRATION.txt TEST.txt [--recipes svd ...]

Calibrates on the first 32 windows of 512 tokens; measures on the first 8 windows of 512 of the test text and of
the second half of Python's documentation. One calibration of a recipe serves all its shares. Each recipe has a
process of its own, so that its peak memory is its own, taken before the dense predictions are kept for measuring.
Rows are written as they come; a second run measures only what is missing. Refiners run where a recipe has them;
`--work` keeps what the long recipes have finished.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from _common import LENGTH, TEST_WINDOWS, WINDOWS, Bench, Corpora, read_report, write_report

from eckart.planning.goals import Goal
from eckart.plans import Plan
from eckart.recipes import Recipe, find

WIDE, NARROW = (0.9, 0.8, 0.7, 0.6, 0.5), (0.8, 0.6)
RECIPES = {  # name of a row: recipe, its options, shares
    "svd": ("svd", {}, NARROW),
    "fwsvd": ("fwsvd", {}, NARROW),
    "asvd, uniform ranks": ("asvd", {"allocator": "uniform"}, NARROW),
    "svd-llm": ("svd-llm", {}, WIDE),
    "basis-sharing": ("basis-sharing", {}, NARROW),
    "d-rank, as printed": ("d-rank", {"allocator.guard": "paper", "allocator.beta": 0.3}, WIDE),
    "cpsvd": ("cpsvd", {}, NARROW),
    "eckart": ("eckart", {}, WIDE),
    "eckart, uncorrected": ("eckart", {"allocator.correction": "off"}, WIDE),
}


def measure_recipe(name: str, arguments: argparse.Namespace) -> None:
    """Calibrate once, plan every share, then measure each; prints one line of JSON for each share."""
    recipe, keeps = find(*RECIPES[name][:2]), RECIPES[name][2]
    bench = Bench(arguments.model, arguments.calibration, work=arguments.work)
    bench.decompose(recipe)
    plans = {keep: bench.plan(recipe, Goal(keep)).plan for keep in keeps}
    seconds = {stage: round(value, 1) for stage, value in bench.stages.seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model_bytes = sum(p.nbytes for p in bench.model.parameters())
    corpora = Corpora(bench.model, bench.tokenizer, arguments.test)
    shared = {
        "recipe": recipe.to_dict(),
        "seconds_of_all_shares": seconds,
        "peak_minus_model_bytes": peak - model_bytes,
        "dense": corpora.figures(bench.model),
    }
    for keep, plan in plans.items():
        row = {"keep_reached": plan.reached["keep"], "model_bytes": plan.reached["model_bytes_kept"]}
        row |= {key: plan.reached[key] for key in ("predicted_kl", "measured_kl") if key in plan.reached}
        print(json.dumps({"keep": keep, **row, **measure_plan(bench, recipe, plan, corpora), **shared}), flush=True)


def measure_plan(bench: Bench, recipe: Recipe, plan: Plan, corpora: Corpora) -> dict:
    """With the plan's factors in the model, refined where the recipe refines."""
    refiners = [r for r in recipe.make_refiners() if r.applies(plan.reached["keep"])]
    with bench.in_place(plan) as work:
        start = time.perf_counter()
        for refiner in refiners:
            refiner.refine_(work)
        refined = {"seconds_refine": round(time.perf_counter() - start, 1), "refinement": work.notes}
        return {**corpora.figures(bench.model), **(refined if refiners else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipes.json"))
    parser.add_argument("--recipes", nargs="*", choices=sorted(RECIPES))
    parser.add_argument("--work", default=None)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.only:
        measure_recipe(arguments.only, arguments)
        return
    report = {**read_report(arguments.out), "windows": [WINDOWS, TEST_WINDOWS, LENGTH]}
    for name in arguments.recipes or RECIPES:
        if all(f"{name} {keep}" in report["rows"] for keep in RECIPES[name][2]):
            continue
        argv = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        for line in subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
            row = json.loads(line)
            report["rows"][f"{name} {row.pop('keep')}"] = row
            print(name, row["keep_reached"], row["wikitext-2"], row["python-docs"], flush=True)
        write_report(arguments.out, report)


if __name__ == "__main__":
    main()
