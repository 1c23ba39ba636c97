"""The README's table of results, generated from benchmarks/results/*.json and never typed.

python benchmarks/table.py          writes it
python benchmarks/table.py --check  exits with 1 when the README is stale
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: scripts/table writes it from benchmarks/results/ -->", "<!-- end of table -->"


def make_table(results: Path) -> str:
    """Markdown: one row for each recipe, perplexity at each share; under it, what the run cost."""
    report = json.loads((results / "baselines.json").read_text())
    rows = report["perplexity"]
    recipes = list(dict.fromkeys(key.rsplit(" ", 1)[0] for key in rows if key != "dense"))
    keeps = sorted({key.rsplit(" ", 1)[1] for key in rows if key != "dense"}, reverse=True)
    lines = [
        "SmolLM2-135M-Instruct, calibrated on the first 32 windows of 512 tokens of the WikiText-2 validation text,",
        "perplexity on the first 8 windows of 512 of its test text. Uniform ranks. "
        f"Dense: {rows['dense']['perplexity']:.2f}.",
        "",
        "| recipe | " + " | ".join(f"{float(keep):.0%} kept" for keep in keeps) + " |",
        "| --- |" + " --- |" * len(keeps),
    ]
    for recipe in recipes:
        cells = [f"{rows[f'{recipe} {keep}']['perplexity']:,.2f}" for keep in keeps]
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *cost_lines(report.get("cost", {}).get("runs", [])), ""])


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


def main() -> None:
    readme = (ROOT / "README.md").read_text()
    head, rest = readme.split(BEGIN)
    tail = rest.split(END)[1]
    fresh = head + BEGIN + "\n" + make_table(ROOT / "benchmarks" / "results") + END + tail
    if "--check" in sys.argv:
        sys.exit(0 if fresh == readme else "README.md: its table is stale; run scripts/table.")
    (ROOT / "README.md").write_text(fresh)


if __name__ == "__main__":
    main()
