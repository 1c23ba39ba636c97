"""Do exact columns pay beside pivoted storage in the two-sided metric? Predicted losses at equal stored numbers.

    python benchmarks/pivoted_columns.py MODEL CALIBRATION.txt --out benchmarks/results/pivoted_columns.json

A pivoted matrix of rank r stores `r (m + n - r)` numbers; c kept columns beside a pivoted rank r' of the others store
`m c + r' (m + n - c - r')`. The kept columns are compensated: for kept columns S and the others R the low-rank part is
the best cut of `W_R` in the Schur complement of H, and `A = W_S + (W_R - M) H_RS H_SS^-1`, so that the error is
`(W_R - M) [I, -H_RS H_SS^-1]` (see `eckart.maths.columns`; a metric on the output side changes neither). Metrics and
cuts are made of three quarters of the windows; the loss is predicted with these ("own") and with the last ("held out").
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from _common import write_report
from torch import Tensor, nn

from eckart import ledger
from eckart.allocators.water_level import WaterLevel
from eckart.checkpoints import checkpoint
from eckart.factorizers.two_sided import TwoSided
from eckart.linalg import Decomposition, Metric, Side
from eckart.maths.columns import column_scores
from eckart.model.discovery import Layout, discover
from eckart.portable.linear import weight_view
from eckart.statistics.sums import GroupStatistics, Need
from eckart.statistics.sweep import sweep
from eckart.text.data import load_windows
from eckart.types import Budget, Group, Spectrum

WINDOWS, LENGTH, BLOCKS = 32, 512, (1, 11, 21, 28)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
KEEPS = (0.8, 0.6)
METHOD = TwoSided()
PLAIN = replace(METHOD, input_shrinkage=0.0, gradient_shrinkage=0.0)

Curves = tuple[Tensor, Tensor]  # own and held-out loss at every rank, in nats per token


def curves(weight: Tensor, early: GroupStatistics, late: GroupStatistics, kept: Tensor) -> Curves:
    """The losses with the columns `kept` (positions) exact and compensated, at every rank of the others."""
    is_rest = torch.ones(weight.shape[1], dtype=torch.bool)
    is_rest[kept] = False
    rest = is_rest.nonzero()[:, 0]
    made = METHOD.metric(weight, early)
    assert made.right is not None
    gram = made.right.gram
    root = torch.linalg.cholesky(gram[kept][:, kept])
    carry = torch.zeros(len(rest), weight.shape[1], dtype=torch.float64)  # [I, -H_RS H_SS^-1]
    carry[torch.arange(len(rest)), rest] = 1
    carry[:, kept] = -torch.cholesky_solve(gram[kept][:, rest], root).T
    seen = of_rest(weight, made, carry, rest)
    decomposition = Decomposition(weight[:, rest].double(), seen)
    unseen = of_rest(weight, PLAIN.metric(weight, late), carry, rest)
    own = METHOD.nats(early) * decomposition.tails_in(seen)
    return own, PLAIN.nats(late) * decomposition.tails_in(unseen)


def of_rest(weight: Tensor, metric: Metric, carry: Tensor, rest: Tensor) -> Metric:
    """The metric for errors `E carry` of the whole weight, as one for errors `E` `[out, rest]`; on the smaller side."""
    assert metric.right is not None
    gram, others = carry @ metric.right.gram @ carry.T, weight[:, rest].double()
    if metric.left is None:
        assert metric.inner is not None
        return Metric(left=None, right=Side(gram=gram, damping=0.0), inner=metric.inner[rest][:, rest])
    return Metric(left=metric.left, right=None, outer=others @ gram @ others.T)


def orders(group: Group, weight: Tensor, early: GroupStatistics) -> Iterator[tuple[str, Tensor]]:
    """Ways to rank the columns, most wanted first."""
    metric = METHOD.metric(weight, early)
    assert metric.right is not None
    energy: Tensor = metric.right.gram.diagonal()
    yield "energy", energy.argsort(descending=True)
    made = Decomposition(weight, metric)
    for keep in KEEPS:
        basis, coefficients = made.truncate(rank_at(group, keep * group.parameters))
        error = weight.double() - (coefficients @ basis).double()
        yield f"score, {keep}", column_scores(error, metric.right.gram).argsort(descending=True)
        if metric.left is None:  # the error is W N
            inner = torch.linalg.lstsq(weight.double(), error).solution
            weighed = (inner * (metric.inner @ inner)).sum(0)
        else:
            weighed = (error * (metric.left.gram @ error)).sum(0)
        yield f"loss score, {keep}", (weighed * energy).argsort(descending=True)


def rank_at(group: Group, allowance: float, kept: int = 0) -> int:
    """Largest rank of the others at no more numbers than `allowance`, pivoted; -1 where the columns cost more."""
    rest = group.in_features - kept
    ranks = range(min(group.out_features, rest) + 1)
    fitting = [r for r in ranks if group.out_features * kept + r * (group.out_features + rest - r) <= allowance]
    return fitting[-1] if fitting else -1


class Module:
    """One matrix: its plain curves, and those of each ranking and count."""

    def __init__(self, group: Group, weight: Tensor, statistics: GroupStatistics) -> None:
        parts = statistics.early_and_late
        assert parts is not None
        self.group, none = group, torch.zeros(0, dtype=torch.long)
        self.curves = {("none", 0): curves(weight, *parts, none)}
        for name, order in orders(group, weight, parts[0]):
            for count in COUNTS:
                if count < group.in_features:
                    self.curves[name, count] = curves(weight, *parts, order[:count])
        values = (self.curves["none", 0][0].diff().neg().clamp(min=0)).sqrt()
        self.spectrum = Spectrum(group, values.sort(descending=True).values, nats=1.0)

    def losses(self, allowance: float, keep: float) -> dict[tuple[str, int], tuple[float, float]]:
        """`{(ranking, count): (own, held-out loss)}` of all that fits; a ranking for another share does not."""
        found = {}
        for (name, count), (own, held_out) in self.curves.items():
            kind, _, of = name.partition(", ")
            rank = rank_at(self.group, allowance, count)
            if rank >= 0 and of in ("", str(keep)):
                found[kind, count] = (float(own[rank]), float(held_out[rank]))
        return found


def modules(model: nn.Module, layout: Layout, ids: Tensor) -> Iterator[Module]:
    for per_block in sweep(model, layout, ids, [Need.INPUT_GRAM, Need.GRADIENT_GRAM]):
        for target in layout.targets:
            if target.name in per_block:
                weight = weight_view(model.get_submodule(target.name))
                yield Module(Group((target,)), weight, GroupStatistics((per_block[target.name],)))
                print(target.name, f"{time.process_time():.0f} s", flush=True)


def compare(found: list[Module], keep: float, allocation: str) -> dict:
    """Sums over the matrices: plain; each count for all (plain where it does not fit); the own best of each."""
    if allocation == "uniform":
        allowances = [keep * m.group.parameters for m in found]
    else:
        entries = WaterLevel().allocate([m.spectrum for m in found], Budget(keep, storage="pivoted"))
        allowances = [
            ledger.parameters(m.group, e.rank, e.storage) if e.rank is not None else m.group.parameters
            for m, e in zip(found, entries, strict=True)
        ]
    losses = [m.losses(allowance, keep) for m, allowance in zip(found, allowances, strict=True)]
    plain = [row["none", 0] for row in losses]
    kinds = ("energy", "score", "loss score")
    same = {f"{k}, {c}": total(row.get((k, c), row["none", 0]) for row in losses) for k in kinds for c in COUNTS}
    picks = [{key: row[key] for key in row if key[0] in ("none", kind)} for kind in kinds for row in losses]
    best = [min(row, key=lambda key, row=row: row[key][0]) for row in picks]
    chosen = [row[key] for row, key in zip(picks, best, strict=True)]
    size, by_kind = len(found), {}
    for at, kind in enumerate(kinds):
        part = slice(at * size, (at + 1) * size)
        by_kind[kind] = {
            "sum": total(chosen[part]),
            "held out, chosen there": sum(min(v[1] for v in row.values()) for row in picks[part]),
            "of each": {
                m.group.name: {"columns": key[1], "own": c[0] / p[0] if p[0] else 1, "held out": c[1] / p[1]}
                for m, key, c, p in zip(found, best[part], chosen[part], plain, strict=True)
                if p[1] > 0
            },
        }
    return {"keep": keep, "allocation": allocation, "plain": total(plain), "same count": same, "own best": by_kind}


def total(pairs) -> list[float]:
    """Sums of own and held-out losses."""
    return [sum(values) for values in zip(*pairs, strict=True)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pivoted_columns.json"))
    given = parser.parse_args()
    model, tokenizer = checkpoint.load_model(given.model), checkpoint.load_tokenizer(given.model)
    ids = load_windows(given.calibration, tokenizer, windows=given.windows, length=LENGTH).ids
    found = list(modules(model, discover(model, [f"*.{block}.*" for block in given.blocks]), ids))
    rows = [compare(found, keep, allocation) for keep in KEEPS for allocation in ("uniform", "water level")]
    for row in rows:
        print(row["keep"], row["allocation"], "plain", row["plain"])
        relative = {**row["same count"], **{f"{k}, own best": v["sum"] for k, v in row["own best"].items()}}
        for name, pair in relative.items():
            print(f"  {name:22}", *(f"{value / plain:.4f}" for value, plain in zip(pair, row["plain"], strict=True)))
    facts = {"windows": given.windows, "length": LENGTH, "blocks": list(given.blocks), "columns": list(COUNTS)}
    write_report(given.out, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
