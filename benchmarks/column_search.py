"""What looking for the best split of one module costs, beside its plain decomposition and one cut of it.

    python benchmarks/column_search.py MODEL CALIBRATION.txt --out benchmarks/results/column_search.json

The linear layers of one block, 8 windows of 512 tokens, keep 0.8, faithful and compensated. An inner
evaluation is the error of one split (eigenvalues without vectors); a decomposition has vectors. The metric's
root, shared by layers with the same input, is made before the clock starts.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _common import Bench, write_report

from eckart import recipes
from eckart.factorizers.column_preserving import ColumnDecomposition, ColumnPreserving
from eckart.ledger import rank_for
from eckart.linalg import Decomposition, Metric, Side
from eckart.maths.columns import Splits
from eckart.types import Budget

KEEP = 0.8


def timed(call: Any, *arguments: Any) -> tuple[Any, float]:
    """The result, and the processor seconds it took (all threads)."""
    start = time.process_time()
    result = call(*arguments)
    return result, time.process_time() - start


def measure(made: ColumnDecomposition, method: ColumnPreserving) -> dict[str, Any]:
    rank = rank_for(made.group, KEEP, Budget(KEEP))
    assert rank is not None
    fresh = ColumnDecomposition(method, made, made.gram)
    plain, weight = made.decomposition, made.decomposition.weight
    side = Side(gram=made.gram, damping=0.0)
    _ = side.root
    _, decomposing = timed(Decomposition, weight, Metric(right=side))
    _, cutting = timed(plain.truncate, rank)
    inner, original = 0, Splits.squared_error

    def counted(splits: Splits, *arguments: int) -> float:
        nonlocal inner
        inner += 1
        return original(splits, *arguments)

    with patch.object(Splits, "squared_error", counted):
        (split_rank, kept), searching = timed(fresh.search, rank)
    _, splitting = timed(fresh.truncate, split_rank, kept)
    return {
        "name": made.group.name,
        "shape": list(weight.shape),
        "compensated": method.compensated,
        "rank": rank,
        "split": [split_rank, kept],
        "inner_evaluations": inner,
        "more_decompositions": int(kept > 0),
        "seconds_decomposition": round(decomposing, 3),
        "seconds_cut": round(cutting, 3),
        "seconds_search": round(searching, 3),
        "seconds_split": round(splitting, 3),
        "search_and_split_by_plain": round((searching + splitting) / (decomposing + cutting), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/column_search.json"))
    options = parser.parse_args()
    bench = Bench(options.model, options.calibration, windows=8, include=[f"*.{options.block}.*"])
    rows = []
    for decomposition in bench.decompose(recipes.find("duo-svd")).values():
        assert isinstance(decomposition, ColumnDecomposition)
        for compensated in (False, True):
            rows.append(measure(decomposition, ColumnPreserving(compensated=compensated)))
            print(json.dumps(rows[-1]), flush=True)
    write_report(options.out, {"threads": torch.get_num_threads(), "keep": KEEP, "rows": rows})


if __name__ == "__main__":
    main()
