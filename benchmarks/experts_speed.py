"""How fast a layer of factorised experts runs beside the dense one: `python benchmarks/experts_speed.py --json OUT`.

A layer of Qwen3-MoE with random weights, every expert at one rank, with 1 token and with 512. Reported are ratios of
medians, dense over factorised, taken in turn in one process, and beside them the ratio of multiply-adds, which is the
limit. The dense layer runs as transformers runs it by default.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from eckart import ledger
from eckart.model.discovery import discover
from eckart.model.experts import opened
from eckart.model.factorise import factorize_, store_
from eckart.types import Group

SIZES = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8}
TOKENS = (1, 512)


def model(dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    rest = {
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **rest)).to(dtype).eval()


def cut_(made: Qwen3MoeForCausalLM, keep: float, storage: str, multiple: int) -> float:
    """Put random factors in the place of every expert; returns the ratio of multiply-adds, dense over factorised."""
    targets = discover(made, include=["*.experts.*"]).targets
    dense = factorised = 0
    with opened(made, targets):
        for target in targets:
            group = Group((target,))
            rank = ledger.rounded(ledger.largest_rank(group, int(keep * group.parameters), storage), group, multiple)
            dtype = made.dtype
            basis, coefficients = torch.randn(rank, target.in_features), torch.randn(target.out_features, rank)
            factorize_(made, target.name, basis.to(dtype), coefficients.to(dtype))
            store_(made, target.name, storage)
            dense, factorised = dense + group.parameters, factorised + ledger.parameters(group, rank, storage)
    return dense / factorised


@torch.no_grad()
def ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """Median time of one over that of the other, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 3):
        for run, spent in zip((one, other), times, strict=True):
            began = time.perf_counter()
            run()
            if number >= 3:
                spent.append(time.perf_counter() - began)
    return statistics.median(times[0]) / statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for storage, multiple in (("pair", 8), ("pair", 1), ("pivoted", 8)):
            dense, cut = model(dtype), model(dtype)
            limit = cut_(cut, 0.5, storage, multiple)
            for tokens in TOKENS:
                states = torch.randn(1, tokens, SIZES["hidden_size"], dtype=dtype)
                before, after = (partial(made.model.layers[0].mlp, states) for made in (dense, cut))
                faster = ratio(before, after, arguments.rounds)
                row = {"dtype": str(dtype)[6:], "storage": storage, "rank_multiple": multiple, "tokens": tokens}
                rows.append({**row, "speed": round(faster, 3), "limit": round(limit, 3)})
                print(rows[-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
