"""D-Rank and its parts beside uniform SVD-LLM and Basis Sharing, on any model and texts.

    python benchmarks/d_rank.py MODEL CALIBRATION.txt TEST.txt --out benchmarks/results/d_rank.jsonl

Calibrates on the first 32 windows of 512 tokens, measures on the first 8 windows of 512 of the test text.
One sweep and one decomposition for each group size serve all its plans. One line for each
configuration, with its whole recipe, written as it comes; a second run measures only what is missing.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from _common import Bench, named

from eckart import recipes
from eckart.measuring.perplexity import perplexity
from eckart.plans import Plan
from eckart.plans.figures import with_figures
from eckart.support.versions import versions
from eckart.text.data import load_windows
from eckart.types import Budget

BETAS = (0, 0.1, 0.2, 0.3, 0.4)
PRINTED = {"guard": "paper"}  # the rule as printed, where a row names no other guard


def configurations(size: int) -> Iterator[tuple[str, str, dict, str | None]]:
    """(label, recipe, options, the one kind whose ranks are taken) of all plans at one group size."""
    ranks = "energy_effective_rank"
    shared = {"grouping.size": size, "refiners": "none"}
    yield f"uniform n={size}", "basis-sharing", shared, None
    variants = [({}, BETAS), ({"guard": "multi_head"}, BETAS), ({"dense_cap": True}, BETAS)]
    variants += [({"guard": "multi_head", "dense_cap": True}, (0.1, 0.3)), ({"guard": "grouped"}, (0, 0.1))]
    if size == 1:
        others = ("effective_rank", "stable_rank", "rank_at_95")
        variants += [({"guard": "every"}, (0, 0.1, 0.2))]
        variants += [({"measure": measure}, (0,)) for measure in others] + [({"scope": "model"}, (0,))]
    for options, betas in variants:
        for beta in betas:
            label = " ".join(["d-rank", f"n={size}", f"beta={beta}", *(f"{k}={v}" for k, v in options.items())])
            named = {f"allocator.{k}": v for k, v in {**PRINTED, **options, "beta": beta}.items()}
            yield label, "d-rank", {**shared, **named}, None
    printed = {f"allocator.{key}": value for key, value in PRINTED.items()}
    refitted = {"d-rank": {**printed, "allocator.beta": 0.35}}
    refitted["d-rank dense_cap"] = {**refitted["d-rank"], "allocator.dense_cap": True}
    for label, options in ({"uniform": {}} | refitted).items():
        recipe = "d-rank" if options else "basis-sharing"
        yield f"{label} n={size} refitted", recipe, {"grouping.size": size, **options}, None
    if size == 1:
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            yield f"{ranks} for {kind} alone", "d-rank", {**shared, **printed, "allocator.beta": 0}, kind


class Table:
    """The model, its decompositions at one group size, and the rows measured so far."""

    def __init__(self, model_path: str, calibration: str, test: str, out: Path) -> None:
        self.out = out
        self.rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self.bench = Bench(model_path, calibration)
        self.tests = load_windows(test, self.bench.tokenizer, windows=8, length=512, purpose="evaluation")
        if not self.rows:
            data = {"calibration": named(self.bench.text.read()), "test": named(self.tests)}
            dense = perplexity(self.bench.model, list(self.tests.ids)).value
            self.add({"label": "dense", "keep": 1.0, "perplexity": dense, "data": data, "versions": versions()})

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['keep']:g} {row['label']}: {row['perplexity']:.2f}", flush=True)

    def run(self, size: int, keeps: list[float], only: list[str]) -> None:
        known = {(row["label"], row["keep"]) for row in self.rows}
        work = [(keep, c) for keep in keeps for c in configurations(size) if (c[0], keep) not in known]
        work = [(keep, c) for keep, c in work if not only or any(c[0].endswith(text) for text in only)]
        work = [(keep, c) for keep, c in work if keep <= 0.6 or "refitted" not in c[0]]
        if not work:
            return
        start = time.perf_counter()
        self.bench.decompose(recipes.find("d-rank", {"grouping.size": size}))
        print(f"decomposed at n = {size} in {time.perf_counter() - start:.0f} s", flush=True)
        for keep, (label, name, options, kind) in work:
            self.measure(keep, label, recipes.find(name, options), kind)

    def measure(self, keep: float, label: str, recipe: recipes.Recipe, only_kind: str | None) -> None:
        spectra, groups = self.bench.decomposed.spectra, self.bench.decomposed.groups
        entries = recipe.make_allocator().allocate(spectra, Budget(keep))
        if only_kind is not None:
            uniform = recipes.find("basis-sharing").make_allocator().allocate(spectra, Budget(keep))
            entries = [e if e.name.endswith(only_kind) else u for e, u in zip(entries, uniform, strict=True)]
        entries = [with_figures(entry, spectrum) for entry, spectrum in zip(entries, spectra, strict=True)]
        plan = Plan(tuple(entries))
        reached = self.bench.loaded.ledger(plan).keep
        with self.bench.in_place(plan) as work:
            for refiner in recipe.make_refiners():
                if refiner.applies(reached):
                    refiner.refine_(work)
            value = perplexity(self.bench.model, list(self.tests.ids)).value
        ranks: dict[str, list] = {}
        for group, entry in zip(groups, entries, strict=True):
            ranks.setdefault(group.kind.rpartition(".")[2], []).append(entry.rank)
        tails = {}
        for spectrum, entry in zip(spectra, entries, strict=True):
            share = (spectrum.error(entry.rank) ** 2 if entry.rank is not None else 0.0) / spectrum.energy
            tails.setdefault(spectrum.group.kind.rpartition(".")[2], []).append(round(share, 5))
        row = {"label": label, "keep": keep, "perplexity": value, "keep_reached": reached, "ranks": ranks}
        self.add({**row, "relative_tail_energy": tails, "recipe": recipe.to_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--only", nargs="+", default=[], help="only configurations whose label ends in one of these")
    options = parser.parse_args()
    table = Table(options.model, options.calibration, options.test, options.out)
    for size in options.sizes:
        table.run(size, options.keeps, options.only)


if __name__ == "__main__":
    main()
