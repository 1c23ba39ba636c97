"""A result of `eckart bench` as tables and sentences: what a report and a comparison say of speed."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def table(result: Row) -> dict[str, Any]:
    """`{"caption", "heads", "rows", "notes"}`, text in every cell: each batch and phase, dense beside compressed."""
    rows = [cells for row in result["rows"] for cells in _cells(row)]
    first = result["rows"][0]
    caption = (
        f"{result['engine']}, {result['dtype']}, {result['threads']} threads of {result['device_name']}; prompts of "
        f"{first['prompt']} tokens, median of {result['repeats']} turns with the dense model"
    )
    notes = [f"Slower than dense: {', '.join(result['slower'])}."] if result["slower"] else []
    peak = result.get("peak_bytes") or {}
    if peak.get("compressed") and peak.get("dense"):
        notes.append(f"Peak memory: {peak['compressed'] / 1e6:,.0f} MB, dense {peak['dense'] / 1e6:,.0f} MB.")
    heads = ["", "dense, tokens/s", "compressed, tokens/s", "speed-up", "quartiles", "limit"]
    return {"caption": caption, "heads": heads, "rows": rows, "notes": [*notes, *result["reasons"]]}


def _cells(row: Row) -> list[list[str]]:
    cells = []
    for phase in ("prefill", "decode"):
        figures = row[phase]
        cells.append(
            [
                f"{phase}, batch {row['batch']}",
                f"{figures['dense_tokens_per_second']:,.1f}",
                f"{figures['tokens_per_second']:,.1f}",
                f"{figures['speedup']:.2f}",
                f"{figures['speedup_low']:.2f} to {figures['speedup_high']:.2f}",
                f"{figures['limit']:.2f}",
            ]
        )
    first = row["prefill"]
    times = [f"{1e3 * first[key]:,.1f} ms" for key in ("dense_seconds", "seconds")]
    return [*cells, [f"first token, batch {row['batch']}", *times, "", "", ""]]
