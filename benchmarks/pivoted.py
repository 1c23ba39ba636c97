"""Pivoted storage beside pair and dense: speed, and the error that rounding adds.

    python benchmarks/pivoted.py MODEL --out benchmarks/results/pivoted.json

Speed, on one tall, one wide and one square shape, in float32: at equal parameters (share 0.8: the
pivoted rank is higher) and at equal rank (the pair's at 0.8), for 1 and 512 tokens, both sides,
median microseconds of interleaved repeats, wall and processor time (the latter does not count what
other processes take). Rounding: eight matrices of the model cut by plain SVD at share 0.8, output
error on normal inputs against float64, with the largest coefficient and the condition of the pivots.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _common import write_report
from torch import nn

from eckart.checkpoints import checkpoint
from eckart.ledger import largest_rank, share
from eckart.maths.pivot import interpolate, pivoted
from eckart.model.discovery import discover
from eckart.model.factorise import factorize_, store_
from eckart.portable.linear import weight_view
from eckart.types import Group, Target

SHAPES = {"tall": (1536, 576), "wide": (576, 1536), "square": (1024, 1024)}
TOKENS = (1, 512)
KEEP = 0.8


def group_of(out_features: int, in_features: int) -> Group:
    return Group((Target("0", 0, "0", out_features, in_features, False),))


def layers(out_features: int, in_features: int) -> dict[str, nn.Module]:
    """Layers of one shape by name, with random factors (conditioning does not change the time)."""
    group = group_of(out_features, in_features)
    allowance = share(KEEP) * group.parameters
    pair_rank, pivoted_rank = (largest_rank(group, allowance, storage) for storage in ("pair", "pivoted"))
    made: dict[str, nn.Module] = {"dense": nn.Linear(in_features, out_features, bias=False)}
    for label, rank, storage, pivots in (
        (f"pair rank {pair_rank}", pair_rank, "pair", None),
        (f"pivoted rows rank {pair_rank}", pair_rank, "pivoted", "rows"),
        (f"pivoted columns rank {pair_rank}", pair_rank, "pivoted", "columns"),
        (f"pivoted rows rank {pivoted_rank}", pivoted_rank, "pivoted", "rows"),
        (f"pivoted columns rank {pivoted_rank}", pivoted_rank, "pivoted", "columns"),
    ):
        model = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        factorize_(model, "0", torch.randn(rank, in_features), torch.randn(out_features, rank))
        if storage == "pivoted":
            store_(model, "0", storage, pivots=pivots)
        made[label] = model[0]
    return made


@torch.inference_mode()
def speed(made: dict[str, nn.Module], tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median microseconds of each layer's forward pass, wall and processor time, interleaved."""
    x = torch.randn(tokens, made["dense"].in_features)
    wall: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    inner = 20 if tokens == 1 else 2
    for _ in range(repeats):
        for name, layer in made.items():
            layer(x)
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(inner):
                layer(x)
            cpu[name].append((time.process_time() - start_cpu) / inner * 1e6)
            wall[name].append((time.perf_counter() - start) / inner * 1e6)
    return {
        name: {"wall": round(statistics.median(wall[name]), 1), "cpu": round(statistics.median(cpu[name]), 1)}
        for name in made
    }


@torch.no_grad()
def rounding(weight: torch.Tensor) -> dict:
    """Relative output error of each storage in each dtype, products taken in float64."""
    out_features, in_features = weight.shape
    group = group_of(out_features, in_features)
    rank = largest_rank(group, share(KEEP) * group.parameters, "pivoted")
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    coefficients, basis = u[:, :rank], s[:rank, None] * vt[:rank]
    x = torch.randn(in_features, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = coefficients @ (basis @ x)
    made = {side: pivoted(basis, coefficients, side) for side in ("rows", "columns")}
    order, _ = interpolate(coefficients.numpy())
    row: dict = {"shape": [out_features, in_features], "rank": rank}
    row["largest_coefficient"] = {
        "rows": float(made["rows"].coefficients.abs().max()),
        "columns": float(made["columns"].basis.abs().max()),
    }
    row["condition_of_pivot_rows"] = float(torch.linalg.cond(coefficients[order[:rank]]))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):

        def cast(t: torch.Tensor, dtype=dtype) -> torch.Tensor:
            return t.to(dtype).double()

        results = {
            "pair": cast(coefficients) @ (cast(basis) @ x),
            "dense": cast(coefficients @ basis) @ x,
        }
        for side, p in made.items():
            results[f"pivoted {side}"] = type(p)(cast(p.basis), cast(p.coefficients), p.index, p.pivots).product() @ x
        row[str(dtype).removeprefix("torch.")] = {
            name: float((y - exact).norm() / exact.norm()) for name, y in results.items()
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pivoted.json"))
    given = parser.parse_args()
    report: dict = {"threads": torch.get_num_threads(), "speed_microseconds": {}, "rounding": {}}
    model = checkpoint.load_model(given.model)
    targets = discover(model).targets
    for target in targets[:: len(targets) // 8][:8]:
        report["rounding"][target.name] = rounding(weight_view(model.get_submodule(target.name)))
        print(target.name, json.dumps(report["rounding"][target.name]), flush=True)
    for name, shape in SHAPES.items():
        made = layers(*shape)
        report["speed_microseconds"][name] = {
            "out x in": list(shape),
            **{f"{t} tokens": speed(made, t, given.repeats) for t in TOKENS},
        }
        print(name, json.dumps(report["speed_microseconds"][name]), flush=True)
        write_report(given.out, report)


if __name__ == "__main__":
    main()
