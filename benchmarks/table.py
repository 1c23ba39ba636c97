"""The README's tables of results, generated from benchmarks/results/ and never typed.

python benchmarks/table.py          writes it
python benchmarks/table.py --check  exits with 1 when the README is stale
"""

import json
import sys
from pathlib import Path

from bench_table import make_bench_table

ROOT = Path(__file__).parents[1]
KEEPS = (0.8, 0.6)
BASELINES = ("svd", "asvd", "fwsvd", "svd-llm")
BEGIN, END = "<!-- table: scripts/table writes it from benchmarks/results/ -->", "<!-- end of table -->"
BENCH_BEGIN, BENCH_END = "<!-- bench: scripts/table writes it from benchmarks/results/ -->", "<!-- end of bench -->"


def make_table(results: Path) -> str:
    """Markdown: one row for each recipe, perplexity at each share, `-` where nobody has measured; then the cost."""
    report = json.loads((results / "baselines.json").read_text())
    rows = [(name, [report["perplexity"][f"{name} {keep}"]["perplexity"] for keep in KEEPS]) for name in BASELINES]
    rows += [
        ("d-rank, n = 1, beta .3 / .4", d_rank(results, "d-rank n=1 beta=0.3", "d-rank n=1 beta=0.4")),
        (
            "d-rank, guard of the authors' code",
            d_rank(results, *[f"d-rank n=1 beta={b} guard=code" for b in (0.3, 0.4)]),
        ),
        ("duo-svd, shares 0.4, 0.8 and dense measured", duo_svd(results, "both")),
        ("duo-svd, compensated", duo_svd(results, "both compensated")),
        ("eckart", eckart_recipe(results)),
    ]
    lines = [
        "SmolLM2-135M-Instruct, calibrated on the first 32 windows of 512 tokens of the WikiText-2 validation text,",
        "perplexity on the first 8 windows of 512 of its test text. No refinement, no recovery. "
        f"Dense: {report['perplexity']['dense']['perplexity']:.2f}.",
        "",
        "| recipe | " + " | ".join(f"{keep:.0%} kept" for keep in KEEPS) + " |",
        "| --- |" + " --- |" * len(KEEPS),
    ]
    for name, values in rows:
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{v:,.2f}" for v in values) + " |")
    return "\n".join([*lines, *cost_lines(report.get("cost", {}).get("runs", [])), ""])


def d_rank(results: Path, *labels: str) -> list[float | None]:
    """The row of `labels[i]` at share i."""
    rows = [json.loads(line) for line in (results / "d_rank.jsonl").read_text().splitlines()]
    found = {(row["label"], row["keep"]): row["perplexity"] for row in rows}
    return [found.get((label, keep)) for label, keep in zip(labels, KEEPS, strict=True)]


def duo_svd(results: Path, plan: str) -> list[float | None]:
    rows = json.loads((results / "duo_svd.json").read_text())["rows"]
    return [rows.get(f"{plan} {keep}", {}).get("perplexity") for keep in KEEPS]


def eckart_recipe(results: Path) -> list[float | None]:
    rows = json.loads((results / "eckart_recipe.json").read_text())["rows"]
    return [rows[f"two_sided water_level pivoted {keep}"]["test"]["perplexity"] for keep in KEEPS]


def cost_lines(runs: list[dict]) -> list[str]:
    """The median run's wall time over one plain forward pass, and its memory above the model's."""
    if not runs:
        return []
    middle = sorted(runs, key=lambda run: run["compress_over_forward"])[len(runs) // 2]
    return [
        "",
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
