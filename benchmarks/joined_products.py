"""Do basis products joined into one pay, where projections read the same input (query, key, value; gate, up)?

    python benchmarks/joined_products.py --out benchmarks/results/joined_products.json

Pairs of one share, 0.6 of the dense parameters: every projection on its own, against one product with the bases
stacked and each projection's coefficients on its slice of the result. Float32, one thread, in processor time; the
fastest fifth of many interleaved calls.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.support.files import write_text

KEEP = 0.6
SHAPES = {  # name: inputs, then the outputs of each projection
    "SmolLM2-135M q, k, v": (576, (576, 192, 192)),
    "SmolLM2-135M gate, up": (576, (1536, 1536)),
    "Llama-3-8B q, k, v": (4096, (4096, 1024, 1024)),
    "Llama-3-8B gate, up": (4096, (14336, 14336)),
}
CALLS = {1: 200, 8: 100, 128: 15}  # tokens: interleaved calls of each


def variants(inputs: int, outputs: tuple[int, ...], tokens: int) -> dict[str, Callable[[], list[Tensor]]]:
    ranks = [int(KEEP * inputs * out / (inputs + out)) for out in outputs]
    bases = [torch.randn(rank, inputs) for rank in ranks]
    coefficients = [torch.randn(out, rank) for out, rank in zip(outputs, ranks, strict=True)]
    stacked, x = torch.cat(bases), torch.randn(tokens, inputs)
    return {
        "apart": lambda: [F.linear(F.linear(x, b), c) for b, c in zip(bases, coefficients, strict=True)],
        "joined": lambda: [
            F.linear(part, c) for part, c in zip(F.linear(x, stacked).split(ranks, -1), coefficients, strict=True)
        ],
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/joined_products.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (inputs, outputs) in SHAPES.items():
        for tokens, calls in CALLS.items():
            ways = variants(inputs, outputs, tokens)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(calls):
                for way, call in ways.items():
                    start = time.thread_time()
                    call()
                    seconds[way].append(time.thread_time() - start)
            fast = {way: sorted(values)[len(values) // 5] * 1e6 for way, values in seconds.items()}
            row = {"projections": name, "tokens": tokens, **{f"us {way}": round(v, 1) for way, v in fast.items()}}
            rows.append({**row, "apart over joined": round(fast["apart"] / fast["joined"], 3)})
            print(json.dumps(rows[-1]), flush=True)
    write_text(options.out, json.dumps({"threads": 1, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
