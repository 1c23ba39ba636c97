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
from recipes import figures, read_tests

from eckart.allocators.knapsack import Knapsack
from eckart.allocators.uniform import Uniform
from eckart.checkpoints import checkpoint
from eckart.support.versions import versions
from eckart.factorizers.column_preserving import ColumnDecomposition, ColumnPreserving
from eckart.factorizers.svd_llm import SVDLLM
from eckart.ledger import make_ledger
from eckart.maths.curve_fit import filled
from eckart.measuring.sensitivity import SHARES, Curves, measure_curves
from eckart.model.discovery import Layout, discover
from eckart.model.factorise import factorize_group_
from eckart.planning.decomposed import decompose
from eckart.portable.linear import swap_
from eckart.recipes import describe
from eckart.support.files import write_text
from eckart.text.data import load_windows
from eckart.types import Budget, Entry, Group

LEVELS = ("uniform", "columns", "compensated", "allocation", "both", "both compensated")
NEAR = (0.7, 0.75, 0.85, 0.9)  # other budgets, planned and predicted with the curves around one
ALSO = {0.8: (0.9, 0.7), 0.6: (0.5,)}  # other budgets, carried out in full with the curves around one


class Bench:
    """A model decomposed once, and what is measured of it."""

    def __init__(self, model: str, calibration: str, test: str, out: Path) -> None:
        self.out, self.report = out, json.loads(out.read_text()) if out.exists() else {"rows": {}}
        self.model, tokenizer = checkpoint.load_model(model), checkpoint.load_tokenizer(model)
        self.windows = load_windows(calibration, tokenizer, windows=32, length=512)
        self.tests, self.dense_tests = read_tests(self.model, tokenizer, test)
        self.short = self.windows.ids[:4, :128]
        self.layout: Layout = discover(self.model)
        self.groups = [Group((target,)) for target in self.layout.targets]
        start = time.perf_counter()
        made = decompose(self.model, self.layout, self.groups, ColumnPreserving(), self.windows.ids)
        self.report["seconds_decompose"] = round(time.perf_counter() - start, 1)
        self.report["versions"], self.report["tokens"] = versions(), self.windows.recipe.to_dict()["tokens_hash"]
        self.made: dict[str, ColumnDecomposition] = made  # type: ignore[assignment]
        with torch.no_grad():
            self.dense = self.model(self.short).logits.log_softmax(-1)
        if "dense" not in self.report["rows"]:
            self.row("dense", [Entry(group.names, None) for group in self.groups])

    def curves(self, keep: float, measured: Sequence[float], work: Path) -> Curves:
        tokens = self.windows.recipe.to_dict()
        start, run = time.perf_counter(), {"evaluations": 0, "seconds": 0.0}
        self.report.setdefault("sensitivity", {}).setdefault(str(keep), []).append(run)

        def progress(stage: str, done: int, total: int) -> None:
            run.update(evaluations=done, seconds=round(time.perf_counter() - start, 1))
            if done % 20 == 0:
                left = f", {run['seconds'] / done * (total - done):.0f} s left" if done else ""
                print(f"{stage} {done}/{total}, {run['seconds']:.0f} s{left}", flush=True)
                write_text(self.out, json.dumps(self.report, indent=1) + "\n")

        depends = {
            "factorizer": describe("SVDLLM", SVDLLM()),
            "calibration": {key: tokens[key] for key in ("tokens_hash", "windows", "length")},
        }
        return measure_curves(
            self.model, self.layout, self.made, self.short, keep,
            work=work, depends=depends, shares=measured, progress=progress,
        )  # fmt: skip

    def kl(self) -> float:
        """KL from the dense model on the sensitivity windows, nats per token."""
        with torch.no_grad():
            found = self.model(self.short).logits.log_softmax(-1)
        return float((self.dense.exp() * (self.dense - found)).sum(-1).double().mean())

    def row(self, name: str, entries: Sequence[Entry], measure_perplexity: bool = True, **more: Any) -> None:
        """Carry the entries out, measure, put the dense modules back, and write the row down."""
        start = time.perf_counter()
        settled = [e if e.rank is None else self.made[e.name].settle(e) for e in entries]
        seconds, dense = round(time.perf_counter() - start, 1), {}
        for group, entry in zip(self.groups, settled, strict=True):
            dense[group.name] = self.model.get_submodule(group.name)
            if entry.rank is not None:
                factorize_group_(self.model, group, entry, self.made[group.name])
        parameters = self.layout.parameters
        row: dict[str, Any] = {"keep_reached": make_ledger(self.groups, settled, parameters, 4).keep, "kl": self.kl()}
        if measure_perplexity:
            found = figures(self.model, self.tests, self.dense_tests)
            row |= {"perplexity": found["wikitext-2"]["perplexity"], "kl_wikitext_2": found["wikitext-2"]["kl"]}
            row |= {
                "perplexity_python_docs": found["python-docs"]["perplexity"],
                "kl_python_docs": found["python-docs"]["kl"],
            }
        row |= {"seconds_settle": seconds, "split": sum(bool(e.kept) for e in settled), **more}
        row["columns_kept"] = sum(e.kept or 0 for e in settled)
        row["dense_modules"] = sum(e.rank is None for e in settled)
        for member, module in dense.items():
            swap_(self.model, member, module)
        self.report["rows"][name] = row
        print(name, json.dumps(row), flush=True)
        write_text(self.out, json.dumps(self.report, indent=1) + "\n")

    def compensate(self, compensated: bool) -> None:
        for decomposition in self.made.values():
            decomposition.method = replace(decomposition.method, compensated=compensated)

    def level(self, level: str, keep: float, entries: Sequence[Entry], **more: Any) -> None:
        if f"{level} {keep}" not in self.report["rows"]:
            self.compensate("compensated" in level)
            fixed = level in ("uniform", "allocation")
            kept = 0 if fixed else None
            self.row(f"{level} {keep}", [replace(e, kept=kept if e.rank else None) for e in entries], **more)


def predicted(curves: Curves, entries: Sequence[Entry], bench: Bench) -> float:
    """The separable prediction of a plan on the candidate grid, nats per token."""
    total = curves.resting
    for entry, group in zip(entries, bench.groups, strict=True):
        spent = 1.0 if entry.rank is None else entry.rank * (group.in_features + group.out_features) / group.parameters
        losses = filled(curves.losses[group.name], [*SHARES, curves.target])
        share = min(losses, key=lambda s: abs(s - spent))
        total += losses[share] - curves.resting
    return total / curves.tokens


def run(bench: Bench, keep: float, measured: Sequence[float], work: Path, levels: Sequence[str]) -> None:
    spectra = [bench.made[group.name].spectrum for group in bench.groups]
    uniform = Uniform().allocate(spectra, Budget(keep))
    for level in LEVELS[:3]:  # the last two can wait until the sensitivities are there
        if level in levels and (level == "uniform" or not set(levels) & set(LEVELS[3:])):
            bench.level(level, keep, uniform)
    if not set(levels) & set(LEVELS[3:]):
        return
    curves = bench.curves(keep, measured, work)
    seen = [replace(s, measured=curves.losses[s.group.name]) for s in spectra]
    entries = Knapsack().allocate(seen, Budget(keep))
    more = {"shares_measured": sorted(next(iter(curves.losses.values())))}
    for level in ("allocation", "both", "columns", "both compensated", "compensated"):
        if level in levels:
            if level in LEVELS[3:]:
                bench.level(level, keep, entries, predicted_kl=predicted(curves, entries, bench), **more)
            else:
                bench.level(level, keep, uniform, predicted_kl=curves.resting / curves.tokens)
    bench.report["rows"][f"uniform {keep}"]["predicted_kl"] = curves.resting / curves.tokens
    for other in ALSO.get(keep, ()):
        plan = Knapsack().allocate(seen, Budget(other))
        bench.level("both", other, plan, predicted_kl=predicted(curves, plan, bench), curves_around=keep)
    for other in NEAR if keep == 0.8 else ():
        name = f"near {keep} at {other}"
        if name not in bench.report["rows"]:
            plan = [replace(e, kept=0 if e.rank else None) for e in Knapsack().allocate(seen, Budget(other))]
            bench.row(name, plan, False, predicted_kl=predicted(curves, plan, bench))


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
    bench = Bench(options.model, options.calibration, options.test, options.out)
    measured = [float(share) for share in options.measured.split(",")]
    for keep in options.keep:
        run(bench, keep, measured, options.work, options.levels.split(","))
    write_text(options.out, json.dumps(bench.report, indent=1) + "\n")


if __name__ == "__main__":
    main()
