"""The heat maps of a report: block by kind of linear layer, one for each thing that is known of every matrix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _View:
    """What one map shows: the text of a cell and its value; `most` is the value with the strongest colour."""

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], float]
    most: float = 1.0


def maps(modules: Sequence[Row]) -> list[dict[str, Any]]:
    """The maps that `report_facts.modules` can fill; a figure that no matrix has makes no map."""
    views = [
        _View("Parameters kept, %", lambda r: _or_dense(r, f"{100 * r['share']:.0f}"), lambda r: min(r["share"], 1.0)),
        _View("Rank", lambda r: _or_dense(r, str(r["rank"])), _rank_share),
    ]
    if most := _most(modules, "bits"):
        views.append(_View("Bits of a number", lambda r: str(r["bits"] or "·"), lambda r: r["bits"] or 0, most))
    if most := _most(modules, "kept"):
        views.append(_View("Columns kept exactly", lambda r: str(r["kept"] or "·"), lambda r: r["kept"], most))
    if most := _most(modules, "energy_effective_rank"):
        views.append(_view("Energy effective rank", "energy_effective_rank", 0, most))
    for key, title in (("predicted_loss", "Predicted loss"), ("measured_alone", "Measured loss when cut alone")):
        if most := _most(modules, key):
            power = min(2 - floor(log10(most)), 300)  # so that the largest has three digits
            views.append(_view(f"{title}, 1e{-power} nats per token", key, power, most))
    return [_map(modules, view) for view in views]


def _most(modules: Sequence[Row], key: str) -> float:
    values = [float(row[key]) for row in modules if row[key] is not None]
    return max([0.0, *filter(isfinite, values)])


def _or_dense(row: Row, text: str) -> str:
    return "d" if row["rank"] is None and not row["bits"] else text.replace("None", "full")


def _rank_share(row: Row) -> float:
    return 1.0 if row["rank"] is None else float(row["rank"] / row["full_rank"])


def _view(title: str, key: str, power: int, most: float) -> _View:
    """A map of a figure times ten to a power: whole from ten on, one decimal below."""

    def text(row: Row) -> str:
        if row[key] is None:
            return "-"
        number = row[key] * 10.0**power
        return f"{number:.0f}" if number >= 9.95 or number == 0 else f"{number:.1f}"

    return _View(title, text, lambda row: row[key] or 0.0, most)


def _map(modules: Sequence[Row], view: _View) -> dict[str, Any]:
    """Title, column heads, and rows `(block, cells)`; a cell is None where a block has no such layer."""
    kinds = list(dict.fromkeys(row["kind"] for row in modules))
    cells = {}
    for row in modules:
        colour = min(1.0, view.value(row) / view.most)  # the strongest for what is not finite
        cells[row["block"], row["kind"]] = {"v": colour, "text": view.text(row), "title": details(row)}
    blocks = sorted({row["block"] for row in modules})
    rows = [(block, [cells.get((block, kind)) for kind in kinds]) for block in blocks]
    return {"title": view.title, "kinds": short_names(kinds), "rows": rows}


def short_names(kinds: Sequence[str]) -> list[str]:
    """The last part of each dotted name where that tells them apart, else the whole."""
    last = [kind.rsplit(".", 1)[-1] for kind in kinds]
    return [short if last.count(short) == 1 else kind for short, kind in zip(last, kinds, strict=True)]


def details(row: Row) -> str:
    """Everything about one matrix, for the pointer."""
    text = f"{row['name']}: {row['out']} x {row['in']}, "
    rank = "" if row["rank"] is None else f"rank {row['rank']} of {row['full_rank']}, "
    text += "dense" if not rank and not row["bits"] else f"{rank}{row['storage']}"
    text += f", {row['bits']} bits" if row["bits"] else ""
    text += f", {row['kept']} columns kept" if row["kept"] else ""
    text += f", basis shared by {row['group']}" if row["group"] > 1 else ""
    return text + f", {row['share']:.1%} of its parameters"
