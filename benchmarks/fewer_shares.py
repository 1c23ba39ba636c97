"""What measuring two shares instead of ten costs: the fitted curve against all ten, on a sample of modules.

    python benchmarks/fewer_shares.py MODEL CALIBRATION.txt --out benchmarks/results/fewer_shares.json

Same protocol and journal as `benchmarks/duo_svd.py`, so that what is there is not measured again. The
error of a fitted point is said in units of the span of its curve from 0.3 to dense.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from eckart import checkpoint
from eckart.curve_fit import filled, fit
from eckart.data import load_windows
from eckart.decomposing import decompose
from eckart.discovery import discover
from eckart.factorizers.svd_llm import SVDLLM
from eckart.files import write_text
from eckart.recipes import describe
from eckart.sensitivity import SHARES, measure_curves
from eckart.types import Group

KEEP, FEW = 0.8, (0.4, 0.8, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--modules", type=int, default=14)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fewer_shares.json"))
    options = parser.parse_args()
    model, tokenizer = checkpoint.load_model(options.model), checkpoint.load_tokenizer(options.model)
    windows, layout = load_windows(options.calibration, tokenizer, windows=32, length=512), discover(model)
    made = decompose(model, layout, [Group((t,)) for t in layout.targets], SVDLLM(), windows.ids)
    step = len(made) // options.modules + (len(made) // options.modules % 7 == 0)  # not always the same type
    sample = list(made)[::step][: options.modules]
    tokens = windows.recipe.to_dict()
    depends = {
        "factorizer": describe("SVDLLM", SVDLLM()),
        "calibration": {key: tokens[key] for key in ("tokens_hash", "windows", "length")},
    }
    curves = measure_curves(
        model, layout, made, windows.ids[:4, :128], KEEP, work=options.work, depends=depends, only=sample
    )  # fmt: skip
    rows = []
    for name in sample:
        curve = curves.losses[name]
        few = filled({share: curve[share] for share in FEW}, SHARES)
        span = curve[0.3] - curve[1.0]
        errors = {str(share): (few[share] - curve[share]) / span for share in SHARES if share not in FEW}
        rows.append({"name": name, "power": fit({s: curve[s] for s in FEW})[1], "span": span, "errors": errors})
    shares = [str(share) for share in SHARES if share not in FEW]
    summary = {share: median(abs(row["errors"][share]) for row in rows) for share in shares}  # type: ignore[index]
    worst = {share: max(abs(row["errors"][share]) for row in rows) for share in shares}  # type: ignore[index]
    report = {"few": FEW, "median_error_by_span": summary, "largest_error_by_span": worst, "rows": rows}
    write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps({"median": summary, "largest": worst}, indent=1))


if __name__ == "__main__":
    main()
