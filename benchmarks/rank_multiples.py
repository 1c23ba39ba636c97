"""What `--rank-multiple` buys and costs: speed, predicted loss and perplexity for ranks in multiples of 1 to 64.

    python benchmarks/rank_multiples.py MODEL CALIBRATION.txt TEST.txt [--keep 0.6]

Recipe `eckart` without its correction, stored as pairs and pivoted, from one calibration. Prompts of 128 tokens and
then single ones, batch 1, one thread, float32; all variants and the dense model take turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from _common import Bench, Corpora, write_report

from eckart import recipes
from eckart.model.factorise import store_
from eckart.model.walk import replaced
from eckart.planning.goals import Goal
from eckart.timing.subjects import TorchSubject, prompt_ids

MULTIPLES, STORAGES = (1, 8, 16, 32, 64), ("pair", "pivoted")
PROMPT, STEPS = 128, 8


def once(subject: TorchSubject, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the prompt, and of one step (the median)."""
    subject.prefill(ids)  # another model has just run
    at = time.perf_counter()
    token, state = subject.prefill(ids)
    first, steps = time.perf_counter() - at, []
    for _ in range(STEPS):
        at = time.perf_counter()
        token, state = subject.step(token, state)
        steps.append(time.perf_counter() - at)
    return first, statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rank_multiples.json"))
    given = parser.parse_args()
    bench = Bench(given.model, given.calibration)
    model = bench.model
    bench.decompose(recipes.find("eckart"))
    corpora = Corpora(model, bench.tokenizer, given.test)
    rows, layers = {}, {"dense": {}}
    for storage in STORAGES:
        recipe = recipes.find("eckart", {"allocator.correction": "off", "storage": storage})
        for multiple in MULTIPLES:
            plan = bench.plan(recipe, Goal(given.keep), multiple).plan
            key = f"{storage}, multiples of {multiple}"
            with bench.in_place(plan):
                names = [entry.name for entry in plan.entries if entry.rank is not None]
                layers[key] = {name: store_(model, name, storage) for name in names}
                rows[key] = {**plan.reached, **corpora.figures(model)}
            print(key, rows[key]["predicted_kl"], rows[key]["wikitext-2"], rows[key]["python-docs"], flush=True)
    torch.set_num_threads(1)
    subject, ids = TorchSubject(model), prompt_ids(model.config.vocab_size, 1, PROMPT)
    seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in layers}
    for turn in range(given.turns):
        for key in list(layers)[:: 1 if turn % 2 else -1]:
            with replaced(model, layers[key]):
                seconds[key].append(once(subject, ids))
    for key, row in rows.items():
        for phase, name in enumerate(("prefill", "decode")):
            ratios = [d[phase] / c[phase] for d, c in zip(seconds["dense"], seconds[key], strict=True)]
            row[f"{name}_speedup"] = statistics.median(ratios)
        print(key, round(row["prefill_speedup"], 3), round(row["decode_speedup"], 3), flush=True)
    write_report(given.out, {"keep": given.keep, "rows": rows})


if __name__ == "__main__":
    main()
