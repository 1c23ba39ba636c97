"""The second-order prediction of one module's cut against its measured KL.

    python benchmarks/second_order.py MODEL CALIBRATION.txt --out benchmarks/results/second_order.json

Decomposes a sample of modules, spread over depth and types, in the two-sided metric (sampled labels,
16 windows of 512 tokens), cuts each alone in the dense model, and compares the predicted loss of the cut
with the KL measured on 4 windows of 128.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import median, pstdev

from _common import Bench, write_report

from eckart import recipes
from eckart.ledger import rank_for
from eckart.measuring.sensitivity import measure_curves
from eckart.types import Budget

SHARES = (0.3, 0.6, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--modules", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/second_order.json"))
    options = parser.parse_args()
    bench = Bench(options.model, options.calibration, windows=16)
    layout = bench.loaded.layout
    kinds = list(dict.fromkeys(target.kind for target in layout.targets))
    last = layout.targets[-1].block
    places = [(round(i * last / (options.modules - 1)), kinds[i % len(kinds)]) for i in range(options.modules)]
    targets = tuple(t for t in layout.targets if (t.block, t.kind) in places)
    bench.loaded.layout = replace(layout, targets=targets)
    made, windows = bench.decompose(recipes.find("eckart")), bench.text.ids()[:4, :128]
    with tempfile.TemporaryDirectory() as work:
        how = {"work": Path(work), "depends": {}, "shares": SHARES}
        curves = measure_curves(bench.model, bench.loaded.layout, made.groups, made.cut, windows, 1.0, **how)
    rows = []
    for name, decomposition in made.items():
        for share in SHARES:
            expected = decomposition.spectrum.loss(rank_for(decomposition.group, share, Budget(share)))
            assert expected is not None
            rows.append({"name": name, "share": share, "predicted": expected, "measured": curves.losses[name][share]})
    summary = {}
    for share in SHARES:
        ratios = [log(row["measured"] / row["predicted"]) for row in rows if row["share"] == share]
        summary[str(share)] = {"measured_by_predicted": exp(median(ratios)), "spread_factor": exp(pstdev(ratios))}
    write_report(options.out, {"modules": len(made), "summary": summary, "rows": rows})
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
