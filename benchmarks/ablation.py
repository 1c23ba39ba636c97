"""From svd-llm to eckart one part at a time, and eckart with one part removed at a time.

    python benchmarks/ablation.py MODEL CALIBRATION.txt TEST.txt [--only two-sided] [--keep 0.8 0.6]

The protocol of `recipes.py`. One calibration of each metric serves all rows that have it. Rows are written as they
come; a second run measures only what is missing. Recovery and refinement: `refinement.py`.
"""

import argparse
import json
from pathlib import Path

from recipes import figures, measure_plan, read_tests

from eckart import Calibration, recipes
from eckart.support.versions import versions
from eckart.planning.goals import Goal
from eckart.progress import silent
from eckart.run import Run
from eckart.support.files import write_text

PAIR, OFF, CHEAP = {"allocator.storage": "pair"}, {"allocator.correction": "off"}, {"allocator.correction": "cheap"}
ONE_SIDED = {"factorizer": "svd_llm"}
ROWS = {  # options that make the row of recipe `eckart`, metric by metric
    "one-sided": {
        "svd-llm": {**ONE_SIDED, "allocator": "uniform"},
        "svd-llm + water level, losses relative": {**ONE_SIDED, **PAIR, **OFF, "allocator.normalise": True},
        "svd-llm + pivoted": {**ONE_SIDED, "allocator": "uniform", "allocator.storage": "pivoted"},
        "without the two-sided metric": {**ONE_SIDED, **OFF},
        "without the two-sided metric, losses relative": {**ONE_SIDED, **OFF, "allocator.normalise": True},
    },
    "two-sided": {
        "svd-llm + two-sided metric": {"allocator": "uniform"},
        "... + water level": {**PAIR, **OFF},
        "... + pivoted = without correction": OFF,
        "... + cheap correction": CHEAP,
        "... + correction = eckart": {},
        "without water level": {"allocator": "uniform", "allocator.storage": "pivoted"},
        "without pivoted": PAIR,
    },
    "true labels": {"cheap, true labels instead of sampled": {**CHEAP, "factorizer.labels": "true"}},
    "mixed labels": {"cheap, mixed labels instead of sampled": {**CHEAP, "factorizer.labels": "mixed"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument("--work", default=None)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="metrics; all without it")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.8, 0.6])
    arguments = parser.parse_args()
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": {}}
    report["versions"] = versions()
    for rows in (ROWS[metric] for metric in arguments.only):
        if all(f"{name} {keep}" in report["rows"] for name in rows for keep in arguments.keep):
            continue
        variants = {name: recipes.find("eckart", options) for name, options in rows.items()}
        calibration = Calibration(arguments.calibration, windows=32, length=512)
        first = next(iter(variants.values()))
        run = Run(arguments.model, first, None, calibration, None, (), (), "cpu", "auto", arguments.work, silent)
        tests, dense = read_tests(run.model, run.tokenizer, arguments.test)
        report["dense"] = figures(run.model, tests, dense)
        for name, run.recipe in variants.items():
            for keep in arguments.keep:
                if f"{name} {keep}" in report["rows"]:
                    continue
                plan = run.make_plan(Goal.of(keep, None, None), 1)
                row = {**plan.reached, **measure_plan(run, plan, tests, dense)}
                report["rows"][f"{name} {keep}"] = row
                print(name, keep, row["wikitext-2"], row["python-docs"], flush=True)
                write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
