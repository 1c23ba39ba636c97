"""What measuring two shares instead of ten costs: fitted curves against measured ones, of every module.

    python benchmarks/fewer_shares.py --out benchmarks/results/fewer_shares.json

Reads the journals that `duo_svd.py` left in benchmarks/results, one for each resting share. The error of a
fitted point is said in units of the span of its curve from 0.3 to dense.
"""

import argparse
import json
from pathlib import Path
from statistics import median, quantiles

from eckart.allocators.knapsack import SHARES
from eckart.maths.curve_fit import filled
from eckart.support.files import write_text

RESULTS = Path(__file__).parent / "results"
FEW = {0.8: (0.4, 0.8, 1.0), 0.6: (0.3, 0.6, 1.0)}


def read_curves(journal: Path) -> tuple[float, dict[str, dict[float, float]]]:
    """The resting share, and the KL of each module at every share."""
    header, *rows = (json.loads(line) for line in journal.read_text().splitlines())
    resting = next(row["kl"] for row in rows if not row["group"])
    curves: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["group"]:
            curves.setdefault(row["group"], {header["target"]: resting})[row["share"]] = row["kl"]
    return header["target"], curves


def errors(curves: dict[str, dict[float, float]], few: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Of the fitted points at each share that `few` leaves out: median and 90th percentile over the modules."""
    found: dict[float, list[float]] = {share: [] for share in SHARES if share not in few}
    for curve in curves.values():
        fitted = filled({share: curve[share] for share in few}, SHARES)
        span = max(abs(curve[0.3] - curve[1.0]), 1e-12)
        for share, values in found.items():
            values.append(abs(fitted[share] - curve[share]) / span)
    return {str(s): {"median": median(v), "90 %": quantiles(v, n=10)[-1]} for s, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "fewer_shares.json")
    report = {}
    for journal in sorted(RESULTS.glob("sensitivity-*.jsonl")):
        target, curves = read_curves(journal)
        report[str(target)] = {"measured": FEW[target], "modules": len(curves), "errors": errors(curves, FEW[target])}
    write_text(parser.parse_args().out, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
