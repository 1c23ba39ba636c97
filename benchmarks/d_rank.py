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
from dataclasses import replace
from pathlib import Path

from torch import nn

from eckart import recipes
from eckart.checkpoints import checkpoint
from eckart.support.versions import versions
from eckart.evaluation.measure import perplexity
from eckart.ledger import make_ledger
from eckart.plans.figures import with_figures
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_group_
from eckart.planning.decomposed import decompose
from eckart.plans.plan import Plan
from eckart.portable.linear import swap_, weight_view
from eckart.refiners.base import Refinement
from eckart.text.data import load_windows
from eckart.types import Budget

BETAS = (0, 0.1, 0.2, 0.3, 0.4)


def configurations(size: int) -> Iterator[tuple[str, str, dict, str | None]]:
    """(label, recipe, options, the one kind whose ranks are taken) of all plans at one group size."""
    ranks = "energy_effective_rank"
    shared = {"grouping.size": size, "refiners": "none"}
    yield f"uniform n={size}", "basis-sharing", shared, None
    variants = [({}, BETAS), ({"guard": "code"}, BETAS), ({"dense_cap": True}, BETAS)]
    variants += [({"guard": "code", "dense_cap": True}, (0.1, 0.3))]
    if size == 1:
        others = ("effective_rank", "stable_rank", "rank_at_95")
        variants += [({"guard": "every"}, (0, 0.1, 0.2))]
        variants += [({"measure": measure}, (0,)) for measure in others] + [({"scope": "model"}, (0,))]
    for options, betas in variants:
        for beta in betas:
            label = " ".join(["d-rank", f"n={size}", f"beta={beta}", *(f"{k}={v}" for k, v in options.items())])
            named = {f"allocator.{k}": v for k, v in {**options, "beta": beta}.items()}
            yield label, "d-rank", {**shared, **named}, None
    for label, recipe, options in (("uniform", "basis-sharing", {}), ("d-rank", "d-rank", {}),
                                   ("d-rank dense_cap", "d-rank", {"allocator.dense_cap": True})):  # fmt: skip
        yield f"{label} n={size} refitted", recipe, {"grouping.size": size, **options}, None
    if size == 1:
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            yield f"{ranks} for {kind} alone", "d-rank", {**shared, "allocator.beta": 0}, kind


class Bench:
    """The model, its decompositions at one group size, and the rows measured so far."""

    def __init__(self, model_path: str, calibration: str, test: str, out: Path) -> None:
        self.out = out
        self.rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        self.model, tokenizer = checkpoint.load_model(model_path), checkpoint.load_tokenizer(model_path)
        self.windows = load_windows(calibration, tokenizer, windows=32, length=512)
        self.tests = load_windows(test, tokenizer, windows=8, length=512, purpose="evaluation")
        self.layout = discover(self.model)
        if not self.rows:
            data = {"calibration": named(self.windows), "test": named(self.tests)}
            dense = perplexity(self.model, list(self.tests.ids)).value
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
        self.groups = recipes.find("basis-sharing", {"grouping.size": size}).make_grouping().groups(self.layout.targets)
        factorizer = recipes.find("d-rank").make_factorizer()
        self.made = decompose(self.model, self.layout, self.groups, factorizer, self.windows.ids)
        print(f"decomposed at n = {size} in {time.perf_counter() - start:.0f} s", flush=True)
        for keep, (label, name, options, kind) in work:
            self.measure(keep, label, recipes.find(name, options), kind)

    def measure(self, keep: float, label: str, recipe: recipes.Recipe, only_kind: str | None) -> None:
        spectra = [self.made[group.name].spectrum for group in self.groups]
        entries = recipe.make_allocator().allocate(spectra, Budget(keep))
        if only_kind is not None:
            uniform = recipes.find("basis-sharing").make_allocator().allocate(spectra, Budget(keep))
            entries = [e if e.name.endswith(only_kind) else u for e, u in zip(entries, uniform, strict=True)]
        entries = [with_figures(entry, spectrum) for entry, spectrum in zip(entries, spectra, strict=True)]
        dense: dict[str, nn.Module] = {t.name: self.model.get_submodule(t.name) for t in self.layout.targets}
        for group, entry in zip(self.groups, entries, strict=True):
            if entry.rank is not None:
                factorize_group_(self.model, group, entry, self.made[group.name])
        ledger = make_ledger(self.groups, entries, self.layout.parameters, 4)
        for refiner in recipe.make_refiners():
            if refiner.applies(ledger.keep):
                weights = {n: weight_view(dense[n]) for e in entries if e.rank is not None for n in e.targets}
                plan = Plan(tuple(entries))
                refiner.refine_(Refinement(self.model, self.layout, plan, weights, self.windows.ids))
        value = perplexity(self.model, list(self.tests.ids)).value
        for name, module in dense.items():
            swap_(self.model, name, module)
        ranks: dict[str, list] = {}
        for group, entry in zip(self.groups, entries, strict=True):
            ranks.setdefault(group.kind.rpartition(".")[2], []).append(entry.rank)
        tails = {}
        for spectrum, entry in zip(spectra, entries, strict=True):
            share = (spectrum.error(entry.rank) ** 2 if entry.rank is not None else 0.0) / spectrum.energy
            tails.setdefault(spectrum.group.kind.rpartition(".")[2], []).append(round(share, 5))
        row = {"label": label, "keep": keep, "perplexity": value, "keep_reached": ledger.keep, "ranks": ranks}
        self.add({**row, "relative_tail_energy": tails, "recipe": recipe.to_dict()})


def named(windows) -> dict:
    """The data recipe with file names in the place of paths."""
    recipe = windows.recipe
    parts = tuple(replace(part, source=Path(part.source).name) for part in recipe.parts)
    return replace(recipe, spec=Path(recipe.spec).name, parts=parts).to_dict()


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
    bench = Bench(options.model, options.calibration, options.test, options.out)
    for size in options.sizes:
        bench.run(size, options.keeps, options.only)


if __name__ == "__main__":
    main()
