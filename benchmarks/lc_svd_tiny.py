"""Every part of LC-SVD on a tiny model of letters that is trained here in about a minute.

    python benchmarks/lc_svd_tiny.py CALIBRATION.txt TEST.txt --out benchmarks/results/lc_svd_tiny.json

Four blocks of width 64, trained on the calibration text; calibrated on 40 windows of 64 letters, measured on
64 windows of the test text and of Python's documentation. It says which parts work and how they compare,
not what they are worth on a language model: that is `lc_svd.py`. A second run measures what is missing.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch

import eckart
from eckart.measuring.perplexity import perplexity
from eckart.recipes import find
from eckart.support.files import write_text
from eckart.support.versions import versions
from eckart.testing import tiny_model, tiny_tokenizer
from eckart.text.data import load_windows

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
COLLABORATION = {"block_collaborative.rate": 2e-3, "block_collaborative.check_every": 5}
ROWS = {
    "svd-llm": ("svd-llm", {}),
    "sequential update": ("svd-llm", {"refiners": "sequential_update"}),
    "alternating": ("svd-llm", {"refiners": "alternating"}),
    "collaboration, grassmann, anchored": ("lc-svd-fixed", COLLABORATION),
    "collaboration, grassmann, same input": (
        "lc-svd-fixed",
        {**COLLABORATION, "block_collaborative.target": "same_input"},
    ),
    "collaboration, decomposed": (
        "lc-svd-fixed",
        {**COLLABORATION, "block_collaborative.form": "svd", "block_collaborative.rate": 3e-2},
    ),
    "collaboration, free": (
        "lc-svd-fixed",
        {**COLLABORATION, "block_collaborative.form": "free", "block_collaborative.free_rate": 1e-3},
    ),
    "collaboration, not refreshed": ("lc-svd-fixed", {**COLLABORATION, "block_collaborative.refresh": False}),
    "search per block": ("lc-svd", {"refiners": "none"}),
    "search per kind": ("lc-svd", {"refiners": "none", "allocator.per": "kind"}),
    "search and collaboration": ("lc-svd", COLLABORATION),
}


def train(text: str, steps: int = 400) -> torch.nn.Module:
    model = tiny_model("Llama", **SHAPE, num_key_value_heads=2, initializer_range=0.05).train()
    windows = load_windows(text, tiny_tokenizer(), windows=None, length=64).ids
    adam, generator = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (24,), generator=generator)]
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        adam.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lc_svd_tiny.json"))
    arguments = parser.parse_args()
    tokenizer, dense = tiny_tokenizer(), train(arguments.calibration)
    tests = {
        name: list(load_windows(spec, tokenizer, windows=64, length=64, purpose="evaluation").ids)
        for name, spec in (("test", arguments.test), ("python-docs", "python-docs"))
    }
    known = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else {}
    report = {"versions": versions(), "dense": {n: perplexity(dense, w).value for n, w in tests.items()}, "rows": known}
    print("dense", report["dense"], flush=True)
    for keep in (0.8, 0.6):
        for name, (recipe, options) in ROWS.items():
            if f"{name} {keep}" in known:
                continue
            start = time.perf_counter()
            made = eckart.compress(
                copy.deepcopy(dense),
                tokenizer=tokenizer,
                recipe=find(recipe, options),
                keep=keep,
                calibration=eckart.Calibration(arguments.calibration, windows=40, length=64),
            )
            row = {n: perplexity(made.model, w).value for n, w in tests.items()}
            row |= {"seconds": round(time.perf_counter() - start, 1), "keep_reached": made.ledger.keep}
            row["blocks"] = made.provenance.get("refinement", [])
            row["search"] = made.plan.entries[0].details.get("search")
            report["rows"][f"{name} {keep}"] = row
            print(f"{name} {keep}", {k: row[k] for k in (*tests, "seconds")}, flush=True)
            write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
