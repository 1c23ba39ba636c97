"""A layer with preserved columns against the plain pair of the same parameters: batch 1 and 512 tokens.

    python benchmarks/kept_columns.py --out benchmarks/results/kept_columns.json

Five ways to reach the columns, all with the same parameters but `zeros`, whose basis in memory spans
all columns: two gathers; one gather of the whole input in a stored order (what `KeptColumnsLinear`
does); zeros in the basis and a gather of the kept columns; and the last two with both products into
the output merged into one. Float32, one thread, in processor time (which a busy machine disturbs less
than wall time); the fastest fifth of many interleaved calls.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.maths.columns import kept_for
from eckart.storages.columns import KeptColumnsLinear
from eckart.storages.pair import FactorizedLinear
from eckart.support.files import write_text

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
KEEP, GIVEN_UP = 0.8, 0.15  # share kept; ranks given up for columns


def variants(out_features: int, in_features: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    rank = int(KEEP * out_features * in_features / (out_features + in_features))
    given_up = int(GIVEN_UP * rank)
    rest, kept = rank - given_up, kept_for(given_up, rank, out_features, in_features)
    pair = FactorizedLinear(in_features, out_features, rank)
    layer = KeptColumnsLinear(in_features, out_features, rest, kept)
    layer.column_order.copy_(torch.randperm(in_features))
    order, split = layer.column_order, in_features - kept
    first, second = order[:split], order[split:]
    basis, coefficients, strip = layer.basis.weight, layer.coefficients.weight, layer.kept.weight
    wide = torch.zeros(rest, in_features)
    wide[:, first.long()] = basis
    merged = torch.cat([coefficients, strip], 1)
    x = torch.randn(1, tokens, in_features)

    def gathered(index: Tensor) -> Tensor:
        return x.reshape(-1, in_features).index_select(1, index)

    def one_gather_merged() -> Tensor:
        y = gathered(order)
        return F.linear(torch.cat([F.linear(y[..., :split], basis), y[..., split:]], -1), merged)

    return {
        "pair": lambda: pair(x),
        "two gathers": lambda: (
            F.linear(F.linear(gathered(first), basis), coefficients) + F.linear(gathered(second), strip)
        ),
        "one gather": lambda: layer(x),
        "zeros": lambda: F.linear(F.linear(x[0], wide), coefficients) + F.linear(gathered(second), strip),
        "one gather, merged": one_gather_merged,
        "zeros, merged": lambda: F.linear(torch.cat([F.linear(x[0], wide), gathered(second)], -1), merged),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kept_columns.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for out_features, in_features in SHAPES:
        for tokens in (1, 512):
            calls = variants(out_features, in_features, tokens)
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(200 if tokens == 1 else 15):
                for name, call in calls.items():
                    start = time.thread_time()
                    call()
                    seconds[name].append(time.thread_time() - start)
            fast = {name: sorted(values)[len(values) // 5] * 1e6 for name, values in seconds.items()}
            row = {"out": out_features, "in": in_features, "tokens": tokens}
            row |= {f"us {name}": round(value, 1) for name, value in fast.items()}
            row |= {f"ratio {name}": round(value / fast["pair"], 3) for name, value in fast.items() if name != "pair"}
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_text(options.out, json.dumps({"threads": 1, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
