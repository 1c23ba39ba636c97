"""The tables of `comparison.py`'s rows, as Markdown: perplexity with what differs, then KL, questions and cost.

Rows are compared in pairs, window by window: what one loses more than the other has a mean and a standard error over
the windows. Nothing under two standard errors is called a difference.
"""

import json
from collections.abc import Sequence
from math import exp, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

CORPORA = ("wikitext-2", "python-docs")
KINDS = {
    "training-free": "Without training",
    "blocks refined": "Blocks refined on the calibration text",
    "with recovery": "With recovery",
}
CLEAR = 2.0  # standard errors
Rows = dict[tuple[str, float], dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """What has been measured, by row and share, from the worst on; a later line of a row replaces an earlier one."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    rows = {(row["row"], row["keep"]): row for row in lines}
    return dict(sorted(rows.items(), key=lambda item: -perplexity(item[1], CORPORA[0])))


def perplexity(row: dict[str, Any], corpus: str) -> float:
    return exp(fmean(row[corpus]["losses"]))


def margin(worse: dict[str, Any], better: dict[str, Any], corpus: str) -> tuple[float, float]:
    """By how many nats per token one loses more than the other, and its standard error over the windows."""
    differences = [a - b for a, b in zip(worse[corpus]["losses"], better[corpus]["losses"], strict=True)]
    return fmean(differences), stdev(differences) / sqrt(len(differences))


def make_comparison(rows: Rows) -> list[str]:
    """Lines of the perplexity table: in bold the best of its kind in a column and all that do not clearly differ."""
    keeps = sorted({keep for _, keep in rows if keep < 1}, reverse=True)
    lines = ["| method | stored as | " + " | ".join(f"{keep:.0%} kept" for keep in keeps) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(keeps)]
    for kind, title in KINDS.items():
        names = list(dict.fromkeys(name for (name, keep), row in rows.items() if row["kind"] == kind and keep < 1))
        if names:
            lines.append(f"| **{title}** | |" + " |" * len(keeps))
        for name in names:
            cells = [cell(rows, name, keep, [rows[n, keep] for n in names if (n, keep) in rows]) for keep in keeps]
            lines.append(f"| {name} | {storage(rows, name)} | " + " | ".join(cells) + " |")
    return lines


def storage(rows: Rows, name: str) -> str:
    return next(row["recipe"]["storage"] for (other, _), row in rows.items() if other == name)


def cell(rows: Rows, name: str, keep: float, rivals: Sequence[dict[str, Any]]) -> str:
    if (name, keep) not in rows:
        return "-"
    mine, parts = rows[name, keep], []
    for corpus in CORPORA:
        best = min(rivals, key=lambda row: perplexity(row, corpus))
        shown = number(perplexity(mine, corpus))
        parts.append(f"**{shown}**" if mine is best or not clearly(mine, best, corpus) else shown)
    return " / ".join(parts)


def clearly(worse: dict[str, Any], better: dict[str, Any], corpus: str) -> bool:
    mean, error = margin(worse, better, corpus)
    return mean > CLEAR * error


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def make_margins(rows: Rows, name: str) -> list[str]:
    """By how much a row is ahead of the best other one of its kind, or behind it, in standard errors, in words."""
    lines = []
    for (other, keep), mine in rows.items():
        rivals = [r for (n, k), r in rows.items() if k == keep and r["kind"] == mine["kind"] and not n.startswith(name)]
        if other != name or not rivals:
            continue
        for corpus in CORPORA:
            rival = min(rivals, key=lambda row: perplexity(row, corpus))
            mean, error = margin(rival, mine, corpus)
            side = "ahead of" if mean > 0 else "behind"
            lines.append(
                f"- {name} at {keep:.0%} on {corpus}: {side} {rival['row']} by {abs(mean):.3f} nats per token, "
                f"{abs(mean) / error:.0f} standard errors."
            )
    return lines


def make_costs(rows: Rows, keep: float) -> list[str]:
    """Lines of the table of KL, questions, time and memory at one share."""
    lines = ["| method | predicted KL | measured KL | on WikiText-2 | on python-docs | PIQA | time | memory |"]
    lines += ["| --- |" + " --- |" * 7]
    for (name, share), row in rows.items():
        if share not in (keep, 1.0):
            continue
        kl = [f"{row[key]:.3f}" if key in row else "-" for key in ("predicted_kl", "measured_kl")]
        kl += [f"{row[corpus]['kl']:.3f}" for corpus in CORPORA]
        time = f"{row['wall_seconds']:,.0f} s" if "wall_seconds" in row else "-"
        memory = f"{row['peak_minus_model_bytes'] / 1e9:.1f} GB" if "peak_minus_model_bytes" in row else "-"
        lines.append(f"| {name} | " + " | ".join([*kl, questions(row), time, memory]) + " |")
    return lines


def questions(row: dict[str, Any]) -> str:
    """Accuracy in percent, the likelier ending by length, with its standard error."""
    if "piqa" not in row:
        return "-"
    found = row["piqa"]["acc_norm"]
    return f"{100 * found['value']:.1f} ± {100 * found['stderr']:.1f}"
