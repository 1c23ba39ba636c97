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
from typing import Any

import torch

from eckart import Calibration
from eckart.support.versions import versions
from eckart.measuring.probe import in_place
from eckart.planning.goals import Goal
from eckart.plans.plan import Plan, resolve
from eckart.portable.linear import weight_view
from eckart.progress import silent
from eckart.run import Run
from eckart.support.files import write_text
from eckart.text.data import load_windows

WIDE, NARROW = (0.9, 0.8, 0.7, 0.6, 0.5), (0.8, 0.6)
RECIPES = {  # name of a row: recipe, its options, shares
    "svd": ("svd", {}, NARROW),
    "fwsvd": ("fwsvd", {}, NARROW),
    "asvd": ("asvd", {}, NARROW),
    "svd-llm": ("svd-llm", {}, WIDE),
    "basis-sharing": ("basis-sharing", {}, NARROW),
    "d-rank": ("d-rank", {}, WIDE),
    "cpsvd": ("cpsvd", {}, NARROW),
    "eckart": ("eckart", {}, WIDE),
    "eckart, uncorrected": ("eckart", {"allocator.correction": "off"}, WIDE),
}
WINDOWS, TEST_WINDOWS, LENGTH = 32, 8, 512


def measure_recipe(name: str, arguments: argparse.Namespace) -> None:
    """Calibrate once, plan every share, then measure each; prints one line of JSON for each share."""
    recipe, options, keeps = RECIPES[name]
    calibration = Calibration(arguments.calibration, windows=WINDOWS, length=LENGTH)
    run = Run(arguments.model, recipe, options, calibration, None, (), (), "cpu", "auto", arguments.work, silent)
    plans = {keep: run.make_plan(Goal.of(keep, None, None), 1) for keep in keeps}
    seconds = {stage: round(value, 1) for stage, value in run.seconds.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model_bytes = sum(p.nbytes for p in run.model.parameters())
    tests, dense = read_tests(run.model, run.tokenizer, arguments.test)
    shared = {
        "recipe": run.recipe.to_dict(),
        "seconds_of_all_shares": seconds,
        "peak_minus_model_bytes": peak - model_bytes,
        "dense": figures(run.model, tests, dense),
    }
    for keep, plan in plans.items():
        row = {"keep_reached": plan.reached["keep"], "model_bytes": plan.reached["model_bytes_kept"]}
        row |= {key: plan.reached[key] for key in ("predicted_kl", "measured_kl") if key in plan.reached}
        print(json.dumps({"keep": keep, **row, **measure_plan(run, plan, tests, dense), **shared}), flush=True)


def read_tests(model: torch.nn.Module, tokenizer: Any, test: str) -> tuple[dict, dict]:
    """The windows of both corpora, and the log-probabilities of `model`, the dense one, on them."""
    tests = {
        label: list(load_windows(spec, tokenizer, windows=TEST_WINDOWS, length=LENGTH, purpose="evaluation").ids)
        for label, spec in (("wikitext-2", test), ("python-docs", "python-docs"))
    }
    return tests, {label: [log_probabilities(model, w) for w in windows] for label, windows in tests.items()}


def measure_plan(run: Run, plan: Plan, tests: dict, dense: dict) -> dict:
    """With the plan's factors in the model, refined where the recipe refines."""
    groups, entries = resolve(plan, run.layout.targets)
    weights = {n: weight_view(run.model.get_submodule(n)) for e in entries if e.rank is not None for n in e.targets}
    refiners = [r for r in run.recipe.make_refiners() if r.applies(plan.reached["keep"])]
    notes: list = []
    with in_place(run.model, groups, entries, run.put):
        start = time.perf_counter()
        for refiner in refiners:
            assert run.windows is not None
            refiner.refine_(run.refinement(plan, weights, run.windows.ids, notes))
        refined = {"seconds_refine": round(time.perf_counter() - start, 1), "refinement": notes} if refiners else {}
        return {**figures(run.model, tests, dense), **refined}


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token of one window `[length]`: `[length - 1, vocabulary]`, float32."""
    return model(input_ids=window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


@torch.inference_mode()
def figures(model: torch.nn.Module, tests: dict, dense: dict) -> dict:
    """Perplexity and mean KL from the dense model on every corpus, from one pass."""
    found = {}
    for label, windows in tests.items():
        loss = divergence = tokens = 0.0
        for window, reference in zip(windows, dense[label], strict=True):
            mine = log_probabilities(model, window)
            loss -= float(mine.gather(1, window[1:, None]).sum(dtype=torch.float64))
            divergence += float((reference.exp() * (reference - mine)).sum(dtype=torch.float64))
            tokens += len(window) - 1
        found[label] = {"perplexity": float(torch.tensor(loss / tokens).exp()), "kl": divergence / tokens}
    return found


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
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    report |= {"versions": versions(), "windows": [WINDOWS, TEST_WINDOWS, LENGTH]}
    for name in arguments.recipes or RECIPES:
        if all(f"{name} {keep}" in report["rows"] for keep in RECIPES[name][2]):
            continue
        argv = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        for line in subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines():
            row = json.loads(line)
            report["rows"][f"{name} {row.pop('keep')}"] = row
            print(name, row["keep_reached"], row["wikitext-2"], row["python-docs"], flush=True)
        write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
