"""Duo-SVD, each level alone and both together, and how well the separable prediction holds.

    python benchmarks/duo_svd.py MODEL CALIBRATION.txt TEST.txt --keep 0.8 --measured 0.5,1.0

Calibrates on the first 32 windows of 512 tokens, measures sensitivity on the first 4 of them cut to
128 tokens, perplexity on the first 8 windows of 512 of the test text and of python-docs. One sweep and
one decomposition of each module serve all rows. Rows and sensitivities are written as they come; a
second run measures only what is missing, after a kill too. `--measured` names fewer shares than the
ten of the paper; the fitted curve stands in for the others. `--plot` draws predicted against measured KL.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import Bench, Corpora, read_report, write_report

from eckart import recipes
from eckart.allocators.knapsack import SHARES, Knapsack
from eckart.allocators.uniform import Uniform
from eckart.factorizers.svd_llm import SVDLLM
from eckart.maths.curve_fit import filled
from eckart.measuring.sensitivity import Curves, measure_curves
from eckart.plans import Plan
from eckart.recipes import describe
from eckart.types import Budget, Entry

NAMES = {  # of perplexity and KL in a row
    "wikitext-2": ("perplexity", "kl_wikitext_2"),
    "python-docs": ("perplexity_python_docs", "kl_python_docs"),
}
LEVELS = ("uniform", "columns", "compensated", "allocation", "both", "both compensated")
NEAR = (0.7, 0.75, 0.85, 0.9)  # other budgets, planned and predicted with the curves around one
ALSO = {0.8: (0.9, 0.7), 0.6: (0.5,)}  # other budgets, carried out in full with the curves around one


class Rows:
    """A model decomposed once, and what is measured of it."""

    def __init__(self, model: str, calibration: str, test: str, out: Path) -> None:
        self.out, self.report = out, read_report(out)
        self.bench = Bench(model, calibration)
        self.model, windows = self.bench.model, self.bench.text.read()
        self.corpora = Corpora(self.model, self.bench.tokenizer, test)
        self.tokens, self.short = windows.recipe.to_dict(), windows.ids[:4, :128]
        start = time.perf_counter()
        self.made = self.bench.decompose(recipes.find("duo-svd"))
        self.report["seconds_decompose"] = round(time.perf_counter() - start, 1)
        self.report["tokens"] = self.tokens["tokens_hash"]
        with torch.no_grad():
            self.dense = self.model(self.short).logits.log_softmax(-1)
        if "dense" not in self.report["rows"]:
            self.row("dense", [Entry(group.names, None) for group in self.made.groups])

    def curves(self, keep: float, measured: Sequence[float], work: Path) -> Curves:
        start, run = time.perf_counter(), {"evaluations": 0, "seconds": 0.0}
        self.report.setdefault("sensitivity", {}).setdefault(str(keep), []).append(run)

        def progress(stage: str, done: int, total: int) -> None:
            run.update(evaluations=done, seconds=round(time.perf_counter() - start, 1))
            if done % 20 == 0:
                left = f", {run['seconds'] / done * (total - done):.0f} s left" if done else ""
                print(f"{stage} {done}/{total}, {run['seconds']:.0f} s{left}", flush=True)
                write_report(self.out, self.report)

        depends = {
            "factorizer": describe("SVDLLM", SVDLLM()),
            "calibration": {key: self.tokens[key] for key in ("tokens_hash", "windows", "length")},
        }
        return measure_curves(
            self.model, self.bench.loaded.layout, self.made.groups, self.made.cut, self.short, keep,
            work=work, depends=depends, shares=measured, progress=progress,
        )  # fmt: skip

    def kl(self) -> float:
        """KL from the dense model on the sensitivity windows, nats per token."""
        with torch.no_grad():
            found = self.model(self.short).logits.log_softmax(-1)
        return float((self.dense.exp() * (self.dense - found)).sum(-1).double().mean())

    def row(self, name: str, entries: Sequence[Entry], measure_perplexity: bool = True, **more: Any) -> None:
        """Measure with the entries in place, and write the row down."""
        start = time.perf_counter()
        settled = self.made.settle(entries)
        seconds, plan = round(time.perf_counter() - start, 1), Plan(tuple(settled))
        row: dict[str, Any] = {"keep_reached": self.bench.loaded.ledger(plan).keep}
        with self.bench.in_place(plan):
            row["kl"] = self.kl()
            found = self.corpora.figures(self.model) if measure_perplexity else {}
        for corpus, measured in found.items():
            row |= dict(zip(NAMES[corpus], measured.values(), strict=True))
        row |= {"seconds_settle": seconds, "split": sum(bool(e.kept) for e in settled), **more}
        row["columns_kept"] = sum(e.kept or 0 for e in settled)
        row["dense_modules"] = sum(e.rank is None for e in settled)
        self.report["rows"][name] = row
        print(name, json.dumps(row), flush=True)
        write_report(self.out, self.report)

    def compensate(self, compensated: bool) -> None:
        for decomposition in self.made.values():
            decomposition.method = replace(decomposition.method, compensated=compensated)

    def level(self, level: str, keep: float, entries: Sequence[Entry], **more: Any) -> None:
        if f"{level} {keep}" not in self.report["rows"]:
            self.compensate("compensated" in level)
            fixed = level in ("uniform", "allocation")
            kept = 0 if fixed else None
            self.row(f"{level} {keep}", [replace(e, kept=kept if e.rank else None) for e in entries], **more)


def predicted(curves: Curves, entries: Sequence[Entry], rows: Rows) -> float:
    """The separable prediction of a plan on the candidate grid, nats per token."""
    total = curves.resting
    for entry, group in zip(entries, rows.made.groups, strict=True):
        spent = 1.0 if entry.rank is None else entry.rank * (group.in_features + group.out_features) / group.parameters
        losses = filled(curves.losses[group.name], [*SHARES, curves.target])
        share = min(losses, key=lambda s: abs(s - spent))
        total += losses[share] - curves.resting
    return total


def run(rows: Rows, keep: float, measured: Sequence[float], work: Path, levels: Sequence[str]) -> None:
    spectra = rows.made.spectra
    uniform = Uniform().allocate(spectra, Budget(keep))
    for level in LEVELS[:3]:  # the last two can wait until the sensitivities are there
        if level in levels and (level == "uniform" or not set(levels) & set(LEVELS[3:])):
            rows.level(level, keep, uniform)
    if not set(levels) & set(LEVELS[3:]):
        return
    curves = rows.curves(keep, measured, work)
    seen = [replace(s, observed={"sensitivity": curves.losses[s.group.name]}) for s in spectra]
    entries = Knapsack().allocate(seen, Budget(keep))
    more = {"shares_measured": sorted(next(iter(curves.losses.values())))}
    for level in ("allocation", "both", "columns", "both compensated", "compensated"):
        if level in levels:
            if level in LEVELS[3:]:
                rows.level(level, keep, entries, predicted_kl=predicted(curves, entries, rows), **more)
            else:
                rows.level(level, keep, uniform, predicted_kl=curves.resting)
    rows.report["rows"][f"uniform {keep}"]["predicted_kl"] = curves.resting
    for other in ALSO.get(keep, ()):
        plan = Knapsack().allocate(seen, Budget(other))
        rows.level("both", other, plan, predicted_kl=predicted(curves, plan, rows), curves_around=keep)
    for other in NEAR if keep == 0.8 else ():
        name = f"near {keep} at {other}"
        if name not in rows.report["rows"]:
            plan = [replace(e, kept=0 if e.rank else None) for e in Knapsack().allocate(seen, Budget(other))]
            rows.row(name, plan, False, predicted_kl=predicted(curves, plan, rows))


def plot(report: dict[str, Any], path: Path) -> None:
    """Predicted against measured KL of whole plans, one point each, in a panel for each resting share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5))
    for number, around in enumerate((0.8, 0.6), 1):
        axes = figure.add_subplot(1, 2, number)
        points = {
            name.removeprefix(f"near {around} "): (row["predicted_kl"], row["kl"])
            for name, row in report["rows"].items()
            if "predicted_kl" in row and (row.get("curves_around") == around or f" {around}" in name)
        }
        high = 1.1 * max(found for _, found in points.values())
        axes.plot([0, high], [0, high], color="grey", linewidth=1, linestyle="--", label="prediction = measurement")
        for name, (expected, found) in points.items():
            columns = name.startswith(("both", "columns", "compensated"))
            axes.scatter(expected, found, color="C1" if columns else "C0", zorder=3)
            side, where = ("right", -6) if columns else ("left", 6)
            axes.annotate(name, (expected, found), (where, -2), textcoords="offset points", fontsize=6, ha=side)
        axes.set_ylim(0, high)
        axes.set_xlim(min(x for x, _ in points.values()) - 0.75 * high, 1.3 * high)
        axes.legend(fontsize=7, loc="lower right")
        axes.set_xlabel("predicted KL, nats per token (separable)")
        axes.set_ylabel("measured KL, nats per token")
        axes.set_title(f"Curves around {around}: blue without, orange with kept columns", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--measured", default=",".join(map(str, SHARES)))
    parser.add_argument("--levels", default=",".join(LEVELS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/duo_svd.json"))
    parser.add_argument("--work", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.out.read_text()), options.plot)
        return
    rows = Rows(options.model, options.calibration, options.test, options.out)
    measured = [float(share) for share in options.measured.split(",")]
    for keep in options.keep:
        run(rows, keep, measured, options.work, options.levels.split(","))
    write_report(options.out, rows.report)


if __name__ == "__main__":
    main()
