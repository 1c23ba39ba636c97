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

from eckart.checkpoints import checkpoint
from eckart.support.versions import versions
from eckart.factorizers.two_sided import TwoSided
from eckart.measuring.sensitivity import candidate_rank, measure_curves
from eckart.model.discovery import discover
from eckart.planning.decomposed import decompose
from eckart.support.files import write_text
from eckart.text.data import load_windows
from eckart.types import Group

SHARES = (0.3, 0.6, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--modules", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/second_order.json"))
    options = parser.parse_args()
    model, tokenizer = checkpoint.load_model(options.model), checkpoint.load_tokenizer(options.model)
    windows = load_windows(options.calibration, tokenizer, windows=16, length=512).ids
    layout = discover(model)
    kinds = list(dict.fromkeys(target.kind for target in layout.targets))
    last = layout.targets[-1].block
    places = [(round(i * last / (options.modules - 1)), kinds[i % len(kinds)]) for i in range(options.modules)]
    targets = tuple(t for t in layout.targets if (t.block, t.kind) in places)
    layout = replace(layout, targets=targets)
    made = decompose(model, layout, [Group((target,)) for target in targets], TwoSided(), windows)
    made = {target.name: made[target.name] for target in targets}
    with tempfile.TemporaryDirectory() as work:
        curves = measure_curves(
            model, layout, made, windows[:4, :128], 1.0, work=Path(work), depends={}, shares=SHARES
        )  # fmt: skip
    rows = []
    for name, decomposition in made.items():
        for share in SHARES:
            expected = decomposition.spectrum.loss(candidate_rank(decomposition.group, share))
            assert expected is not None
            found = curves.losses[name][share] / curves.tokens
            rows.append({"name": name, "share": share, "predicted": expected, "measured": found})
    summary = {}
    for share in SHARES:
        ratios = [log(row["measured"] / row["predicted"]) for row in rows if row["share"] == share]
        summary[str(share)] = {"measured_by_predicted": exp(median(ratios)), "spread_factor": exp(pstdev(ratios))}
    report = {"modules": len(made), "summary": summary, "rows": rows, "versions": versions()}
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
