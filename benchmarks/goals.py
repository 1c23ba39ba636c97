"""Do --max-kl and --size give models that meet what was asked? Recipe eckart, one calibration for all goals.

    python benchmarks/goals.py MODEL CALIBRATION.txt TEST.txt --work DIR

For a bound: the KL predicted, measured on text that calibration did not see (which the bound is about), and, for
what it is worth, on the two test texts. For a size: the bytes of the weight files that were saved, in a folder that
must not be there yet. Bounds are written as they come; a second run measures only the missing ones, and the sizes.
"""

import argparse
import json
from pathlib import Path

from _common import Bench, Corpora, read_report, write_report

from eckart import recipes
from eckart.planning.goals import Goal, parse_size
from eckart.run import carry_out

BOUNDS, SIZES = (0.05, 0.1, 0.2, 0.4), ("480MB", "400MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/goals.json"))
    arguments = parser.parse_args()
    if (arguments.work / "sized").exists():
        parser.error(f"{arguments.work}/sized is there; name another folder or delete it.")
    bench, recipe = Bench(arguments.model, arguments.calibration), recipes.find("eckart")
    bench.decompose(recipe)
    corpora = Corpora(bench.model, bench.tokenizer, arguments.test)
    report = read_report(arguments.out, "bounds", "sizes")
    report["dense"] = corpora.figures(bench.model)
    for bound in BOUNDS:
        if str(bound) in report["bounds"]:
            continue
        plan = bench.plan(recipe, Goal(max_kl=bound)).plan
        with bench.in_place(plan):
            report["bounds"][str(bound)] = {**plan.reached, **corpora.figures(bench.model)}
        print(bound, json.dumps(report["bounds"][str(bound)]), flush=True)
        write_report(arguments.out, report)
    plans = {size: bench.plan(recipe, Goal.of(None, size, None)) for size in arguments.size}
    for size, planned in plans.items():
        report["sizes"][size] = {"asked": parse_size(size), **planned.plan.reached}
    last = arguments.size[-1]  # carrying out takes the decompositions, so one of them
    how = {"work": None, "stages": bench.stages, "command": lambda **_: ""}
    carry_out(bench.loaded, bench.text, recipe, plans[last], **how).save(arguments.work / "sized")
    saved = sum(path.stat().st_size for path in (arguments.work / "sized").glob("*.safetensors"))
    report["sizes"][last]["saved"] = saved
    print(json.dumps(report["sizes"]), flush=True)
    write_report(arguments.out, report)


if __name__ == "__main__":
    main()
