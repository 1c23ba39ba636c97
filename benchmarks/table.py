"""The README's tables of results, generated from benchmarks/results/ and never typed.

python benchmarks/table.py          writes it
python benchmarks/table.py --check  exits with 1 when the README is stale
"""

import json
import sys
from pathlib import Path

from bench_table import make_bench_table
from comparison_table import CORPORA, make_comparison, make_costs, make_margins, number, perplexity, read_rows
from recipes_table import make_recipes_table

ROOT = Path(__file__).parents[1]
ABOUT = """SmolLM2-135M-Instruct (4-bit source: a quantised file, dequantised), calibrated on the first 32 windows of
512 tokens of the WikiText-2 validation text; perplexity on the first 64 windows of 512 of its test text / of the
second half of Python's documentation, which is unlike it. Dense: {dense}. In bold the best of its kind in a column,
and all that differ from it by less than two standard errors of the difference, taken in pairs over the windows."""
COSTS = """At 80 %: KL divergence from the dense model in nats per token, as predicted and measured on calibration text
before saving, then on the first 8 windows of both texts; PIQA's questions (the ending that is likelier by length, in
percent, with its standard error); wall time of the whole command on two cores without a GPU, other work beside it,
and memory above the model's.
"""
BEGIN, END = "<!-- table: scripts/table writes it from benchmarks/results/ -->", "<!-- end of table -->"
BENCH_BEGIN, BENCH_END = "<!-- bench: scripts/table writes it from benchmarks/results/ -->", "<!-- end of bench -->"


def make_table(results: Path) -> str:
    """Markdown: every recipe, then what the command line costs as a whole."""
    report = json.loads((results / "baselines.json").read_text())
    costs = cost_lines(report.get("cost", {}).get("runs", []))
    return "\n".join([*comparison_lines(results), make_recipes_table(results), *costs, ""])


def comparison_lines(results: Path) -> list[str]:
    """The rows of `comparison.py`, with what they are measured on."""
    rows = read_rows(results / "comparison.jsonl")
    dense = " / ".join(number(perplexity(rows["dense", 1.0], corpus)) for corpus in CORPORA)
    tables = [make_comparison(rows), make_margins(rows, "eckart"), [COSTS, *make_costs(rows, 0.8)]]
    return [ABOUT.format(dense=dense), *(line for table in tables for line in ("", *table)), ""]


def cost_lines(runs: list[dict]) -> list[str]:
    """The median run's wall time over one plain forward pass, and its memory above the model's."""
    if not runs:
        return []
    middle = sorted(runs, key=lambda run: run["compress_over_forward"])[len(runs) // 2]
    return [
        f"`eckart compress --recipe svd-llm` as a whole, start of Python to saved folder, on two cores without a "
        f"GPU: {middle['compress_seconds']:.0f} s, {middle['compress_over_forward']:.2f} times one plain forward pass "
        f"over the same tokens ({middle['forward_seconds']:.0f} s), with "
        f"{middle['peak_minus_model_bytes'] / 1e9:.2f} GB of memory above the model's own "
        f"{middle['model_bytes'] / 1e9:.2f} GB. Command: `python benchmarks/baselines.py` (median of {len(runs)}).",
    ]


def put(page: str, begin: str, end: str, content: str) -> str:
    """The page with what stands between two marks replaced."""
    head, rest = page.split(begin)
    return head + begin + "\n" + content + end + rest.split(end)[1]


def main() -> None:
    readme, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    fresh = put(readme, BEGIN, END, make_table(results))
    fresh = put(fresh, BENCH_BEGIN, BENCH_END, make_bench_table(results))
    if "--check" in sys.argv:
        sys.exit(0 if fresh == readme else "README.md: its table is stale; run scripts/table.")
    (ROOT / "README.md").write_text(fresh)


if __name__ == "__main__":
    main()
