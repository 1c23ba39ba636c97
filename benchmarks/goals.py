"""Do --max-kl and --size give models that meet what was asked? Recipe eckart, one calibration for all goals.

    python benchmarks/goals.py MODEL CALIBRATION.txt TEST.txt --work DIR

For a bound: the KL predicted, measured on text that calibration did not see (which the bound is about), and, for
what it is worth, on the two test texts. For a size: the bytes of the weight files that were saved, in a folder that
must not be there yet. Bounds are written as they come; a second run measures only the missing ones, and the sizes.
"""

import argparse
import json
from pathlib import Path

from recipes import figures, measure_plan, read_tests

from eckart import Calibration
from eckart.support.versions import versions
from eckart.planning.goals import Goal, parse_size
from eckart.progress import silent
from eckart.run import Run
from eckart.support.files import write_text

BOUNDS, SIZES = (0.05, 0.1, 0.2, 0.4), ("480MB", "400MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/goals.json"))
    arguments = parser.parse_args()
    if (arguments.work / "sized").exists():
        parser.error(f"{arguments.work}/sized is there; name another folder or delete it.")
    calibration = Calibration(arguments.calibration, windows=32, length=512)
    run = Run(arguments.model, "eckart", {}, calibration, None, (), (), "cpu", "auto", None, silent)
    tests, dense = read_tests(run.model, run.tokenizer, arguments.test)
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"bounds": {}, "sizes": {}}
    report |= {"versions": versions(), "dense": figures(run.model, tests, dense)}
    for bound in BOUNDS:
        if str(bound) in report["bounds"]:
            continue
        plan = run.make_plan(Goal.of(None, None, bound), 1)
        report["bounds"][str(bound)] = {**plan.reached, **measure_plan(run, plan, tests, dense)}
        print(bound, json.dumps(report["bounds"][str(bound)]), flush=True)
        write_text(arguments.out, json.dumps(report, indent=1) + "\n")
    plans = {size: run.make_plan(Goal.of(None, size, None), 1) for size in SIZES}
    for size, plan in plans.items():
        report["sizes"][size] = {"asked": parse_size(size), **plan.reached}
    last = SIZES[-1]  # carrying out takes the decompositions, so one of them
    run.carry_out(plans[last])
    run.result(plans[last], "").save(arguments.work / "sized")
    saved = sum(path.stat().st_size for path in (arguments.work / "sized").glob("*.safetensors"))
    report["sizes"][last]["saved"] = saved
    print(json.dumps(report["sizes"]), flush=True)
    write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
