"""LC-SVD beside SVD-LLM: collaboration alone, search alone, both; tied, free; anchored, same input; 0.8 and 0.6 kept.

    python benchmarks/lc_svd.py MODEL CALIBRATION.txt TEST.txt --out benchmarks/results/lc_svd.json --work DIR

Calibrates on the first 32 windows of 512 tokens, measures on the first 8 windows of 512 of the test text
and, to watch for over-fitting, on 8 of the second half of Python's documentation. A row is written when
it is done; a second run measures only what is missing, and resumes inside a row from DIR. `--rows`
picks rows by name; `-o block_collaborative.steps=20` overrides an option of every row that has the part,
and is written beside its result.
"""

import argparse
import time
from pathlib import Path

from _common import LENGTH, TEST_WINDOWS, WINDOWS, Corpora, read_report, write_report

import eckart
from eckart.checkpoints import checkpoint
from eckart.recipes import BUILT_IN, find

COLLABORATION = {
    "collaboration": {},
    "collaboration, same input": {"block_collaborative.target": "same_input"},
    "collaboration, free": {"block_collaborative.form": "free"},
    "collaboration, decomposed at each step": {"block_collaborative.form": "svd"},
}


def rows() -> dict:
    """`{name: (recipe, options, keep)}` in the order they run."""
    made = {}
    for keep in (0.8, 0.6):
        made[f"svd-llm {keep}"] = ("svd-llm", {}, keep)
        for name, options in COLLABORATION.items():
            made[f"{name} {keep}"] = ("lc-svd-fixed", options, keep)
        made[f"search {keep}"] = ("lc-svd", {"refiners": "none"}, keep)
        made[f"search and collaboration {keep}"] = ("lc-svd", {}, keep)
        made[f"search per kind {keep}"] = ("lc-svd", {"refiners": "none", "allocator.per": "kind"}, keep)
    for keep in (0.9, 0.7, 0.5):
        made[f"search and collaboration {keep}"] = ("lc-svd", {}, keep)
    return made


def measure(row: tuple, arguments: argparse.Namespace, overrides: dict, corpora: Corpora) -> dict:
    recipe_name, options, keep = row
    parts = (*BUILT_IN[recipe_name].refiners, "allocator" if recipe_name == "lc-svd" else "")
    options = {**options, **{k: v for k, v in overrides.items() if k.partition(".")[0] in parts}}
    if options.get("refiners") == "none":
        options = {k: v for k, v in options.items() if not k.startswith("block_collaborative.")}
    start = time.perf_counter()
    made = eckart.compress(
        arguments.model,
        recipe=find(recipe_name, options),
        keep=keep,
        calibration=eckart.Calibration(arguments.calibration, windows=WINDOWS, length=LENGTH),
        work=arguments.work,
    )
    seconds = time.perf_counter() - start
    measured = corpora.figures(made.model)
    notes = made.provenance.get("refinement", [])
    return {
        **{key: {corpus: found[key] for corpus, found in measured.items()} for key in ("perplexity", "kl")},
        "keep_reached": made.ledger.keep,
        "recipe": made.provenance["recipe"],
        "seconds": {"all": round(seconds, 1), **{k: round(v, 1) for k, v in made.seconds.items()}},
        "blocks": [{k: v for k, v in note.items() if k != "refiner"} for note in notes],
        "search": made.plan.entries[0].details.get("search"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lc_svd.json"))
    parser.add_argument("--work", default=None)
    parser.add_argument("--rows", nargs="*", help="names of rows; all without it")
    parser.add_argument("-o", "--option", action="append", default=[])
    arguments = parser.parse_args()
    overrides = dict(pair.split("=", 1) for pair in arguments.option)
    report = {**read_report(arguments.out), "windows": [WINDOWS, TEST_WINDOWS, LENGTH]}
    model, tokenizer = checkpoint.load_model(arguments.model), checkpoint.load_tokenizer(arguments.model)
    corpora = Corpora(model, tokenizer, arguments.test)
    del model  # every row loads its own
    for name, row in rows().items():
        label = name + "".join(f" [{k.partition('.')[2]} {v}]" for k, v in overrides.items() if row[0] != "svd-llm")
        if label in report["rows"] or (arguments.rows and name not in arguments.rows):
            continue
        report["rows"][label] = measure(row, arguments, overrides, corpora)
        print(label, report["rows"][label]["perplexity"], report["rows"][label]["seconds"], flush=True)
        write_report(arguments.out, report)


if __name__ == "__main__":
    main()
