"""The README's tables of results, generated from benchmarks/results/ and never typed.

python benchmarks/table.py          writes it
python benchmarks/table.py --check  exits with 1 when the README is stale
"""

import json
import sys
from pathlib import Path

from bench_table import make_bench_table
from recipes_table import make_recipes_table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: scripts/table writes it from benchmarks/results/ -->", "<!-- end of table -->"
BENCH_BEGIN, BENCH_END = "<!-- bench: scripts/table writes it from benchmarks/results/ -->", "<!-- end of bench -->"


def make_table(results: Path) -> str:
    """Markdown: every recipe, then what the command line costs as a whole."""
    report = json.loads((results / "baselines.json").read_text())
    return "\n".join([make_recipes_table(results), *cost_lines(report.get("cost", {}).get("runs", [])), ""])


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
