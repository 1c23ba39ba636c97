"""The README's table of speed says what the stored cells say."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_table import make_bench_table


def cell(label, threads, batch, speedup):
    phase = {"speedup": speedup, "limit": 1.66, "limit_with_rest": 1.4}
    return {
        "kind": "float32", "label": label, "threads": threads,
        "rows": [{"batch": batch, "prefill": phase, "decode": {**phase, "speedup": 0.954}}],
    }  # fmt: skip


def test_rows_and_what_is_slower(tmp_path):
    cells = {"a": cell("0.4-pair", 1, 1, 1.2), "b": cell("0.8-pair", 1, 1, 1.1), "c": cell("0.8-pair", 1, 8, 1.3)}
    (tmp_path / "bench.json").write_text(json.dumps({"cells": cells}))
    lines = make_bench_table(tmp_path).splitlines()
    assert lines[0].count("|") == 8  # engine, checkpoint, threads, two phases at two batches
    assert lines[2].startswith("| torch float32 | 0.8, pair | 1 | 1.10 (1.66, 1.40) | 1.30 (1.66, 1.40) | **0.95** (")
    assert lines[3].startswith("| torch float32 | 0.4, pair | 1 | 1.20 (1.66, 1.40) | - |")
    assert make_bench_table(tmp_path / "nowhere") == ""
