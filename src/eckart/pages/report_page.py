"""The page of a report: `report_facts.gather` and measurements in, one HTML text out, with nothing to load."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from eckart.pages import charts, report_maps, speed_table
from eckart.pages.render import render
from eckart.support.not_finite import exp

Row = Mapping[str, Any]


def page(facts: Mapping[str, Any]) -> str:
    """The HTML of the facts of one model. Text in them is escaped; the page refers to nothing outside itself."""
    rows = [row for result in facts["evaluations"] for row in result["results"] if "perplexity" in row]
    losses = _losses(facts, rows)
    return render(
        "report.html",
        facts=facts,
        name=Path(facts["folder"]).resolve().name,
        tiles=_tiles(facts, rows),
        goals=_goals(facts),
        bar=_bar(facts["ledger"]),
        perplexity=[_perplexity(row) for row in rows],
        protocol=_protocol(rows[0]["protocol"]) if rows else "",
        losses=losses,
        predicted_note=_PREDICTED if "predicted_kl" in facts["reached"] else "",
        tasks=[cells for result in facts["evaluations"] for cells in _tasks(result)],
        speed=[speed_table.table(result) for result in facts["benches"]],
        maps=report_maps.maps(facts["modules"]),
        charts=_charts(facts["spectra"], facts["modules"]),
        recipe_rows=_recipe(facts["recipe"]),
        data_rows=_data(facts["calibration"]),
    )


_PREDICTED = (
    "The KL divergence says how far the predictions moved from the dense model's; the loss is what perplexity is made "
    "of. The prediction is made before a weight is touched and knows nothing of refinement afterwards."
)


def _tiles(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The figures that a reader wants first."""
    book = facts["ledger"]
    tiles = [
        (f"{book['keep']:.1%}", "of the targets' parameters kept"),
        (f"{book['keep_model']:.1%}", "of the whole model kept"),
        (f"{book['model_bytes_kept'] / 1e6:,.1f} MB", f"instead of {book['model_bytes_dense'] / 1e6:,.1f} MB"),
    ]
    for row in rows[:2]:
        dense = row.get("dense_perplexity")
        beside = f"dense {dense:.2f}, " if dense else ""
        tiles.append((f"{row['perplexity']:.2f}", f"perplexity, {beside}{Path(row['data']).name}"))
    return tiles


def _goals(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was asked beside what came out, in the same words."""
    goal, reached, book = facts["asked"], facts["reached"], facts["ledger"]
    rows = []
    if "size" in goal:
        rows.append(
            ("size of the weights", f"{goal['size'] / 1e6:,.2f} MB", f"{book['model_bytes_kept'] / 1e6:,.2f} MB")
        )
    kl = reached.get("predicted_kl")
    if "max_kl" in goal or kl is not None:
        bound = f"at most {goal['max_kl']:g}" if "max_kl" in goal else "-"
        rows.append(("predicted KL, nats per token", bound, "-" if kl is None else f"{kl:.4f}"))
    rows.append(("share of the targets kept", f"{goal['keep']:g}" if "keep" in goal else "-", f"{book['keep']:.4f}"))
    if (multiple := goal.get("rank_multiple", 1)) != 1:
        rows.append(("ranks are multiples of", str(multiple), str(multiple)))
    return rows


def _bar(book: Mapping[str, float]) -> dict[str, Any]:
    """The model's parameters as parts of what they were, in percent."""
    whole = book["model_parameters_dense"]
    targets, rest = book["target_parameters_kept"] / whole, 1 - book["target_parameters_dense"] / whole
    about = f"targets kept {targets:.1%} of the model, never compressed {rest:.1%}"
    return {"targets": 100 * targets, "rest": 100 * rest, "about": about}


def _perplexity(row: Row) -> dict[str, str]:
    dense = row.get("dense_perplexity")
    return {
        "data": row["data"],
        "compressed": f"{row['perplexity']:.3f}",
        "dense": f"{dense:.3f}" if dense else "-",
        "ratio": f"{row['perplexity'] / dense:.4f}" if dense else "-",
        "windows": f"{row.get('windows') or '-'} × {row['protocol']['length']}",
    }


def _protocol(protocol: Mapping[str, Any]) -> str:
    return (
        f"Protocol: windows of {protocol['length']} tokens, stride {protocol['stride']}, joined by "
        f"{protocol['join']!r}, BOS {protocol['bos']}, mean over {protocol['mean']}s, computed in "
        f"{protocol['dtype']} on {protocol['device']}; token ids {protocol['tokens_hash'][:16]}."
    )


def _losses(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """What the plan predicted, what the finished model measured, and how much the loss rose on each corpus."""
    losses: list[tuple[str, float]] = []
    if (predicted := facts["reached"].get("predicted_kl")) is not None:
        losses.append(("KL of the predictions, predicted by the plan", predicted))
    if facts["kl"] and facts["kl"].get("measured") is not None:
        text = "text that calibration did not see" if facts["kl"].get("unseen") else "calibration text"
        losses.append((f"KL of the predictions, measured on {text}", facts["kl"]["measured"]))
    for row in rows:
        if row.get("kl") is not None:
            losses.append((f"KL of the predictions, measured on {row['data']}", row["kl"]))
        if row.get("nll") is not None and row.get("dense_nll") is not None:
            losses.append((f"rise of the loss, measured on {row['data']}", row["nll"] - row["dense_nll"]))
    return [(text, f"{nats:.4f}", f"{exp(nats):.3f}") for text, nats in losses]


def _tasks(result: Row) -> list[tuple[str, str, str, str]]:
    """A row for each metric of each task, dense beside compressed, with standard errors."""

    def score(figures: Row | None) -> str:
        if figures is None:
            return "-"
        return f"{figures['value']:.3f}" + (f" ± {figures['stderr']:.3f}" if figures.get("stderr") else "")

    return [
        (row["task"], metric, score(row.get("dense_metrics", {}).get(metric)), score(figures))
        for row in result.get("tasks", [])
        for metric, figures in row["metrics"].items()
    ]


def _charts(spectra: Sequence[Row], modules: Sequence[Row]) -> list[tuple[str, str]]:
    """One chart for each kind: how fast the error falls with rank, a curve for each group."""
    by_name = {row["name"]: row for row in modules}
    last = max((row["block"] for row in modules), default=0)
    curves: dict[str, list[charts.Line]] = {}
    for row in spectra:
        module = by_name.get(row["targets"][0])
        if module is None:
            continue
        points = [(rank / row["full_rank"], lost) for rank, lost in row["lost"] if isfinite(lost)]
        mark = None
        if points and module["rank"] is not None:
            at = module["rank"] / row["full_rank"]
            mark = (at, _between(points, at))
        tone = module["block"] / last if last else 0.5
        label = f"{row['targets'][0]}, effective rank {row['effective_rank']:.0f}, stable rank {row['stable_rank']:.1f}"
        curves.setdefault(row["kind"], []).append(charts.Line(points, tone, label, mark))
    return [
        (kind, charts.lines(lines, x_label="share of the full rank", y_label="energy lost"))
        for kind, lines in curves.items()
    ]


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The curve at `at`, between its points as they are drawn: straight on a logarithmic scale."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            part = (at - x0) / (x1 - x0)
            return float(max(y0, 1e-12) ** (1 - part) * max(y1, 1e-12) ** part)
    return points[-1][1]


def _recipe(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A recipe's parts with their options, a row each."""
    rows = []
    for part in ("factorizer", "allocator", "grouping"):
        method = recipe.get(part)
        if isinstance(method, Mapping) and method.get("size") != 1:  # groups of one are no groups
            rows.append((part, _part(method)))
    return rows + [("refiner", _part(method)) for method in recipe.get("refiners") or []]


def _part(method: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} = {value}" for key, value in method.items() if key != "name")
    return f"{method['name']}: {options}" if "name" in method and options else str(method.get("name", options))


def _data(calibration: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not calibration:
        return []
    shape = f"{calibration['windows']} of {calibration['length']} tokens, {calibration['tokens']:,} in all"
    seed = calibration["seed"]
    return [
        ("text", f"{calibration['spec']} ({calibration['split']})"),
        ("windows", shape + (", from the start" if seed is None else f", drawn with seed {seed}")),
        ("joined by, BOS", f"{calibration['join']!r}, {calibration['bos']}"),
        ("hash of the token ids", calibration["tokens_hash"]),
    ]
