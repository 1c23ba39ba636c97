"""Wall time of the sensitivity pass against the naive one: same modules, same shares, same windows, one run.

    python benchmarks/sensitivity_speed.py MODEL CALIBRATION.txt --out benchmarks/results/sensitivity_speed.json

Naive: the whole model for every candidate, with its full log-probabilities, against stored ones of the
dense model. Ours: `eckart.measuring.sensitivity`, everything included (the resting model, the walk to each block,
the reference, the journal). Naive runs module by module between ours, so that both see the same load.
The sample goes through depth and types together: module i of n is of type `i mod types`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from _common import Bench, write_report

from eckart import recipes
from eckart.ledger import rank_for
from eckart.measuring.sensitivity import measure_curves
from eckart.model.walk import replaced
from eckart.types import Budget, Entry

KEEP, SHARES = 0.8, (0.2, 0.4, 0.6, 0.9, 1.0)


class Clock:
    """Adds up wall and processor time of the stretches it is entered for."""

    wall, processor = 0.0, 0.0

    def __enter__(self) -> None:
        self.wall -= time.perf_counter()
        self.processor -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.processor += time.process_time()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--modules", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity_speed.json"))
    options = parser.parse_args()
    bench = Bench(options.model, options.calibration, windows=8)
    model, layout, short = bench.model, bench.loaded.layout, bench.text.ids()[:4, :128]
    made = bench.decompose(recipes.find("svd-llm"))
    kinds = list(dict.fromkeys(target.kind for target in layout.targets))
    last = layout.targets[-1].block
    sample = []
    for number in range(options.modules):
        block = round(number * last / max(1, options.modules - 1))
        sample.append(next(t.name for t in layout.targets if t.block == block and t.kind == kinds[number % len(kinds)]))

    reference = model(short).logits.float().log_softmax(-1)
    dense = {name: model.get_submodule(name) for name in sample}
    values: dict[tuple[str, float], float] = {}
    naive = Clock()

    def progress(stage: str, done: int, total: int) -> None:
        """At the first share of a module the model is at rest: evaluate this module naively, on its own clock."""
        if done == total or done % len(SHARES) or (sample[done // len(SHARES)], SHARES[0]) in values:
            return
        name = sample[done // len(SHARES)]
        with naive:
            for share in SHARES:
                group = made[name].group
                with replaced(model, {name: dense[name]}):
                    layers = made.cut(group, Entry(group.names, rank_for(group, share, Budget(share))))
                    with replaced(model, layers):
                        found = model(short).logits.float().log_softmax(-1)
                    values[name, share] = float((reference.exp() * (reference - found)).sum(-1).double().mean())

    whole = Clock()
    with tempfile.TemporaryDirectory() as work, whole:
        how = {"work": Path(work), "depends": {}, "shares": SHARES, "only": sample, "progress": progress}
        curves = measure_curves(model, layout, made.groups, made.cut, short, KEEP, **how)
    wall, processor = whole.wall - naive.wall, whole.processor - naive.processor
    worst = max(abs(value / curves.losses[name][share] - 1) for (name, share), value in values.items())
    report = {
        "sample": sample,
        "shares": SHARES,
        "seconds_ours": round(wall, 2),
        "seconds_naive": round(naive.wall, 2),
        "ratio": round(wall / naive.wall, 3),
        "processor_seconds_ours": round(processor, 2),
        "processor_seconds_naive": round(naive.processor, 2),
        "processor_ratio": round(processor / naive.processor, 3),
        "largest_relative_difference": worst,
        "load_average": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None,
    }
    write_report(options.out, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
