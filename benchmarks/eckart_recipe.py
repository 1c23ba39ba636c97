"""The parts of the `eckart` recipe one by one: metric x allocation x storage, on two corpora.

    python benchmarks/eckart_recipe.py MODEL CALIBRATION.txt TEST.txt --out benchmarks/results/eckart_recipe.json

Calibrates on the first 32 windows of 512 tokens, measures perplexity and KL on the first 8 windows of
512 of the test text and of python-docs. One calibration of each metric serves every row. A weight is
replaced by the product of its factors, which is the same matrix in every storage; the storage decides
the ranks. Rows are written as they come; a second run measures only what is missing.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import torch

from eckart import checkpoint, registry
from eckart.data import load_windows
from eckart.decomposing import decompose
from eckart.discovery import discover
from eckart.divergence import log_probabilities, mean_kl
from eckart.files import write_text
from eckart.ledger import make_ledger
from eckart.linear import weight_view
from eckart.measure import perplexity
from eckart.provenance import versions
from eckart.types import Budget, Group

METRICS = {  # name of a row's metric: factorizer and its options
    "two_sided mixed": ("two_sided", {"labels": "mixed"}),
    "two_sided": ("two_sided", {}),
    "svd_llm": ("svd_llm", {}),
}
ALLOCATIONS = (("water_level", "pivoted"), ("water_level", "pair"), ("uniform", "pivoted"), ("uniform", "pair"))
KEEPS = (0.8, 0.6, 0.9)
WINDOWS, TEST_WINDOWS, LENGTH = 32, 8, 512


class Bench:
    """The model, the texts, the dense model's predictions, and a decomposition for each metric."""

    def __init__(self, model: str, calibration: str, test: str) -> None:
        self.model, self.tokenizer = checkpoint.load_model(model), checkpoint.load_tokenizer(model)
        self.ids = load_windows(calibration, self.tokenizer, windows=WINDOWS, length=LENGTH).ids
        self.tests = {
            name: list(
                load_windows(spec, self.tokenizer, windows=TEST_WINDOWS, length=LENGTH, purpose="evaluation").ids
            )
            for name, spec in (("test", test), ("python-docs", "python-docs"))
        }
        self.layout = discover(self.model)
        self.groups = [Group((target,)) for target in self.layout.targets]
        self.weights = {g.name: weight_view(self.model.get_submodule(g.name)) for g in self.groups}
        self.originals = {name: weight.clone() for name, weight in self.weights.items()}
        self.reference = {
            name: [log_probabilities(self.model, window) for window in windows] for name, windows in self.tests.items()
        }
        self.made: dict = {}

    def decompositions(self, metric: str, options: dict) -> dict:
        """Decomposed when first asked for; the dense weights must be in place."""
        key = json.dumps([metric, options])
        if key not in self.made:
            start = time.perf_counter()
            factorizer = registry.make("factorizers", metric, options)
            self.made[key] = decompose(self.model, self.layout, self.groups, factorizer, self.ids)
            print(f"{metric}: calibrated and decomposed in {time.perf_counter() - start:.1f} s", flush=True)
        return self.made[key]

    @torch.no_grad()
    def measure(self, metric: str, allocator: str, keep: float, options: dict) -> dict:
        """Put the cut weights in place, measure, and put the dense ones back."""
        made = self.decompositions(*METRICS[metric])
        spectra = [made[group.name].spectrum for group in self.groups]
        entries = registry.make("allocators", allocator, options).allocate(spectra, Budget(keep))
        losses = [s.loss(e.rank) for s, e in zip(spectra, entries, strict=True)]
        for entry in entries:
            if entry.rank is not None:
                self.weights[entry.name].copy_(made[entry.name].truncate(entry.rank).product())
        row = {
            "keep_reached": make_ledger(self.groups, entries, self.layout.parameters, 4).keep,
            "dense_matrices": sum(entry.rank is None for entry in entries),
            "predicted_kl": None if losses[0] is None else sum(losses),
        }
        row |= self.figures()
        for name, weight in self.weights.items():
            weight.copy_(self.originals[name])
        return row

    def figures(self) -> dict:
        """Perplexity and KL from the dense model on every corpus."""
        return {
            name: {
                "perplexity": perplexity(self.model, windows).value,
                "kl": mean_kl(self.model, windows, self.reference[name]),
            }
            for name, windows in self.tests.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eckart_recipe.json"))
    parser.add_argument("--metrics", nargs="*", choices=sorted(METRICS), help="all without it")
    given = parser.parse_args()
    report = json.loads(given.out.read_text()) if given.out.exists() else {}
    bench = Bench(given.model, given.calibration, given.test)
    rows = report.setdefault("rows", {})
    if "dense" not in rows:
        rows["dense"] = bench.figures()
    for metric, (allocator, storage), keep in product(given.metrics or METRICS, ALLOCATIONS, KEEPS):
        name = f"{metric} {allocator} {storage} {keep}"
        if name in rows or (keep == 0.9 and (allocator, storage) != ALLOCATIONS[0]):
            continue
        rows[name] = bench.measure(metric, allocator, keep, {"storage": storage})
        report["versions"] = versions()
        write_text(given.out, json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    main()
