"""The README's table of recipes: both corpora, predicted and measured KL, time and memory.

Read from benchmarks/results/: `recipes.json`, `refinement.json`, and for the two methods that search
for long, `duo_svd.json`, `lc_svd.json` and `peak_memory.json` (the benchmarks of those names). `-` where nobody has
measured.
"""

import json
from pathlib import Path
from typing import Any

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
CORPORA = ("wikitext-2", "python-docs")
Rows = dict[str, dict[float, dict[str, Any]]]  # recipe -> share -> what was measured

ABOUT = """Rows of version 0.1, which were not run again: the same model and calibration, perplexity on the first 8
windows of both texts (dense: {dense}), in bold the best of a column. What rivals lacked: lc-svd had 20 steps of 4
windows for each block (default 100 of 8), 24 candidates on 4 windows (64 on 32), and blocks that went back to factors
which had seen what judged them; duo-svd had sensitivities from 4 windows of 128 tokens (the paper: 33 of 2,048),
around 80 % and 60 % alone; asvd had no rank search."""
ORDER = (
    "svd", "fwsvd", "asvd, uniform ranks", "svd-llm", "basis-sharing", "d-rank, as printed", "cpsvd", "duo-svd",
    "duo-svd, compensated", "lc-svd-fixed", "lc-svd", "eckart, uncorrected", "eckart", "eckart, blocks refined",
    "eckart --recover", "eckart-full",
)  # fmt: skip


def make_recipes_table(results: Path) -> str:
    """Markdown: perplexities at every share, then KL and cost at 0.8."""
    rows, dense = read_rows(results)
    names = [name for name in ORDER if name in rows]
    shown = " / ".join(number(dense[corpus]) for corpus in CORPORA)
    lines = [
        *ABOUT.format(dense=shown).splitlines(),
        "",
        "| recipe | " + " | ".join(f"{keep:.0%} kept" for keep in KEEPS) + " |",
        "| --- |" + " --- |" * len(KEEPS),
    ]
    lines += [f"| {name} | " + " | ".join(perplexities(rows, name, keep) for keep in KEEPS) + " |" for name in names]
    lines += [
        "",
        "At 80 %: KL divergence from the dense model in nats per token, predicted and measured on calibration text",
        "before saving (of refined models on what they were judged on), then on the two test texts; wall time on two",
        "cores without a GPU (cpsvd: one, and other work beside it), memory above the model's (where blocks are",
        "refined, in a process that keeps all decompositions for the next row).",
        "",
        "| recipe | predicted KL | measured KL | on WikiText-2 | on python-docs | time | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [cost_row(name, rows[name][0.8], len(rows[name])) for name in names if 0.8 in rows[name]]
    return "\n".join([*lines, ""])


def read_rows(results: Path) -> tuple[Rows, dict[str, float]]:
    """All that was measured, and the dense perplexities of both corpora."""
    rows: Rows = {}
    stored = json.loads((results / "recipes.json").read_text())["rows"]
    for key, row in stored.items():
        put_row(rows, key, {corpus: row[corpus]["perplexity"] for corpus in CORPORA}, row)
    for key, row in read(results / "refinement.json").items():
        seconds = {"seconds": sum(row["seconds_shared"].values()) + row["seconds_refine"]}
        if key.startswith("eckart 0"):  # the same as in recipes.json, with nothing else running
            rows["eckart"][float(key.rpartition(" ")[2])] |= seconds
        else:
            perplexity = {corpus: row[corpus]["perplexity"] for corpus in CORPORA}
            known = ("measured_kl", "peak_minus_model_bytes", *CORPORA)
            put_row(rows, key, perplexity, {**seconds, **{name: row[name] for name in known}})
    duo = json.loads((results / "duo_svd.json").read_text())
    for key, row in duo["rows"].items():
        name = {"both": "duo-svd", "both compensated": "duo-svd, compensated"}.get(key.rpartition(" ")[0])
        if name and "perplexity_python_docs" in row:
            perplexity = {CORPORA[0]: row["perplexity"], CORPORA[1]: row["perplexity_python_docs"]}
            kl = {CORPORA[0]: row.get("kl_wikitext_2"), CORPORA[1]: row.get("kl_python_docs")}
            keep = key.rpartition(" ")[2]
            measuring = sum(run["seconds"] for run in duo["sensitivity"].get(keep, []))
            seconds = {"seconds": duo["seconds_decompose"] + measuring + row["seconds_settle"]}
            put_row(rows, f"{name} {keep}", perplexity, {**seconds, **divergences(kl)})
    for label, row in read(results / "lc_svd.json").items():
        key = label.partition(" [")[0]  # behind which are the options that were not the defaults
        name = {"collaboration": "lc-svd-fixed", "search and collaboration": "lc-svd"}.get(key.rpartition(" ")[0])
        if name:
            seconds = {"seconds": row["seconds"]["all"]}
            more = {**seconds, **divergences(row.get("kl", {}))}
            put_row(rows, f"{name} {key.rpartition(' ')[2]}", row["perplexity"], more)
    for name, row in read(results / "peak_memory.json").items():
        rows[name][0.8]["peak_minus_model_bytes"] = row["peak_minus_model_bytes"]
    first = next(iter(stored.values()))
    return rows, {corpus: first["dense"][corpus]["perplexity"] for corpus in CORPORA}


def read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def divergences(kl: dict[str, float | None]) -> dict[str, dict[str, float]]:
    """As `recipes.figures` has them, of the corpora that were measured."""
    return {corpus: {"kl": value} for corpus, value in kl.items() if value is not None}


def put_row(rows: Rows, key: str, perplexity: dict[str, float], row: dict[str, Any]) -> None:
    name, _, keep = key.rpartition(" ")
    rows.setdefault(name, {})[float(keep)] = {**row, "perplexity": perplexity}


def perplexities(rows: Rows, name: str, keep: float) -> str:
    if keep not in rows[name]:
        return "-"
    cells = []
    for corpus in CORPORA:
        value = rows[name][keep]["perplexity"][corpus]
        best = min(row[keep]["perplexity"][corpus] for row in rows.values() if keep in row)
        cells.append(f"**{number(value)}**" if value == best else number(value))
    return " / ".join(cells)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def cost_row(name: str, row: dict[str, Any], shares: int) -> str:
    kl = [f"{row[key]:.3f}" if key in row else "-" for key in ("predicted_kl", "measured_kl")]
    kl += [f"{row[corpus]['kl']:.3f}" if corpus in row else "-" for corpus in CORPORA]
    stages = dict(row.get("seconds_of_all_shares", {}))
    stages["probe"] = stages.get("probe", 0.0) / shares  # all else is done once for all shares
    seconds = row.get("seconds") or sum(stages.values()) + row.get("seconds_refine", 0.0)
    time = f"{seconds:,.0f} s" if seconds else "-"
    memory = f"{row['peak_minus_model_bytes'] / 1e9:.1f} GB" if "peak_minus_model_bytes" in row else "-"
    return f"| {name} | " + " | ".join([*kl, time, memory]) + " |"
