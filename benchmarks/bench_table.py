"""The README's table of speed, from benchmarks/results/bench.json."""

import json
from pathlib import Path

COLUMNS = [(phase, batch) for phase in ("prefill", "decode") for batch in (1, 8, 64)]
KINDS = {"float32": "torch float32", "bfloat16": "torch bfloat16", "int8": "ONNX Runtime int8"}


def make_bench_table(results: Path) -> str:
    """Markdown: speed-up over dense with, in brackets, its limit and the limit with the rest; bold where slower."""
    path = results / "bench.json"
    if not path.exists():
        return ""
    cells = json.loads(path.read_text())["cells"].values()
    rows: dict[tuple[str, str, int], dict[tuple[str, int], str]] = {}
    for cell in cells:
        for measured in cell["rows"]:
            row = rows.setdefault((cell["kind"], cell["label"], cell["threads"]), {})
            for phase in ("prefill", "decode"):
                row[phase, measured["batch"]] = text(measured[phase])
    used = [column for column in COLUMNS if any(column in row for row in rows.values())]
    lines = [
        "| engine | kept, storage | threads | " + " | ".join(f"{phase}, batch {batch}" for phase, batch in used) + " |",
        "| --- | --- | --- |" + " --- |" * len(used),
    ]
    for (kind, label, threads), row in sorted(rows.items(), key=order):
        name = label.replace("-", ", ")
        shown = " | ".join(row.get(column, "-") for column in used)
        lines.append(f"| {KINDS[kind]} | {name} | {threads} | {shown} |")
    return "\n".join(lines) + "\n"


def order(item: tuple) -> tuple:
    kind, label, threads = item[0]
    return list(KINDS).index(kind), threads, label.partition("-")[2], -float(label.partition("-")[0])


def text(phase: dict) -> str:
    """`1.18 (1.66, 1.46)`, bold when the compressed model is slower."""
    limits = [phase["limit"], *([phase["limit_with_rest"]] if "limit_with_rest" in phase else [])]
    speed = f"{phase['speedup']:.2f}"
    return f"{speed if phase['speedup'] >= 1 else f'**{speed}**'} ({', '.join(f'{x:.2f}' for x in limits)})"
