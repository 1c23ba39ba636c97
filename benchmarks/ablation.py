"""From svd-llm to eckart one part at a time, and eckart with one part removed at a time.

    python benchmarks/ablation.py MODEL CALIBRATION.txt TEST.txt [--only two-sided] [--keep 0.8 0.6]

The protocol of `recipes.py`. One calibration of each metric serves all rows that have it. Rows are written as they
come; a second run measures only what is missing. Recovery and refinement: `refinement.py`.
"""

import argparse
from pathlib import Path

from _common import Bench, Corpora, read_report, write_report

from eckart import recipes
from eckart.planning.goals import Goal

PAIR, OFF, CHEAP = {"storage": "pair"}, {"allocator.correction": "off"}, {"allocator.correction": "cheap"}
ONE_SIDED, UNIFORM = {"factorizer": "svd_llm"}, {"allocator": "uniform"}
ROWS = {  # options that make the row of recipe `eckart`, metric by metric
    "one-sided": {
        "svd-llm": {**ONE_SIDED, **UNIFORM, **PAIR},
        "svd-llm + water level, losses relative": {**ONE_SIDED, **PAIR, **OFF, "allocator.normalise": True},
        "svd-llm + pivoted": {**ONE_SIDED, **UNIFORM},
        "without the two-sided metric": {**ONE_SIDED, **OFF},
        "without the two-sided metric, losses relative": {**ONE_SIDED, **OFF, "allocator.normalise": True},
    },
    "two-sided": {
        "svd-llm + two-sided metric": {**UNIFORM, **PAIR},
        "... + water level": {**PAIR, **OFF},
        "... + pivoted = without correction": OFF,
        "... + cheap correction": CHEAP,
        "... + correction = eckart": {},
        "without water level": UNIFORM,
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
    report = read_report(arguments.out)
    for rows in (ROWS[metric] for metric in arguments.only):
        if all(f"{name} {keep}" in report["rows"] for name in rows for keep in arguments.keep):
            continue
        variants = {name: recipes.find("eckart", options) for name, options in rows.items()}
        bench = Bench(arguments.model, arguments.calibration, work=arguments.work)
        bench.decompose(next(iter(variants.values())))
        corpora = Corpora(bench.model, bench.tokenizer, arguments.test)
        report["dense"] = corpora.figures(bench.model)
        for name, recipe in variants.items():
            for keep in arguments.keep:
                if f"{name} {keep}" in report["rows"]:
                    continue
                plan = bench.plan(recipe, Goal(keep)).plan
                with bench.in_place(plan):
                    row = {**plan.reached, **corpora.figures(bench.model)}
                report["rows"][f"{name} {keep}"] = row
                print(name, keep, row["wikitext-2"], row["python-docs"], flush=True)
                write_report(arguments.out, report)


if __name__ == "__main__":
    main()
