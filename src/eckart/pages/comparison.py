"""`compare`: several checkpoints in one table, with those that nothing beats, under one protocol or not at all."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from math import isfinite, log
from pathlib import Path
from typing import Any, Unpack

from eckart.errors import OptionError
from eckart.evaluation import results as stored
from eckart.evaluation.measure import evaluate
from eckart.measuring.protocol import ProtocolOptions
from eckart.pages import charts
from eckart.pages.render import render
from eckart.pages.report_facts import summary
from eckart.progress import Progress, silent
from eckart.support.escaping import plain
from eckart.support.files import check_file, write_text

Row = Mapping[str, Any]


def compare(
    folders: Sequence[str | Path],
    *,
    results: Sequence[str | Path] = (),
    against: str | None = None,
    data_specs: Sequence[str] = (),
    out: str | Path | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Unpack[ProtocolOptions],
) -> dict[str, Any]:
    """Sizes and losses of checkpoints side by side, as plain data; with `out` as an HTML page with plots, too.

    `results` are files of `eckart eval --json` and `eckart bench --json`, matched to the folders by the model
    they name; with `data_specs` every model is measured as `evaluate` does (`options` are those of the protocol). Each
    row says on which plots
    (`size`, `speed`) no other model is both as cheap and as good (`best`). Raises `OptionError` when two
    models were measured on different token ids or in different ways: such numbers have no order.
    """
    _check_folders(folders)
    if out is not None:
        check_file(Path(out))  # before any work
    measurements = [stored.read(path) for path in results]
    for path, result in zip(results, measurements, strict=True):
        if not any(stored.is_about(result, folder) for folder in folders):
            raise OptionError(f"{path}: is about {plain(result['model'])}, which is none of the models compared.")
    if data_specs:
        measure = partial(evaluate, against=against, data_specs=data_specs, progress=progress, **options)
        names: dict[str, Any] = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
        measurements += [measure(folder, **names) for folder in folders]
    rows = [_row(folder, measurements) for folder in folders]
    check_protocols(rows)
    for plot, cost in (("size", _bytes), ("speed", _slowness)):
        for row, best in zip(rows, pareto([(cost(r), loss(r)) for r in rows]), strict=True):
            if best:
                row["best"].append(plot)
    facts = {"format": "eckart-compare", "version": 1, "models": rows}
    if out is not None:
        write_text(Path(out), _page(rows))
        facts["page"] = str(out)
    return facts


def _check_folders(folders: Sequence[str | Path]) -> None:
    if len(folders) < 2:
        raise OptionError(f"{len(folders)} model to compare, but there must be at least 2.")
    for one, other in combinations(folders, 2):
        if os.path.realpath(one) == os.path.realpath(other):
            raise OptionError(f"{other}: is there twice; name each model once.")


def _row(folder: str | Path, measurements: Sequence[Row]) -> dict[str, Any]:
    """What is known of one model: its ledger, its perplexities by corpus, its speed."""
    return {
        "folder": str(folder),
        **summary(folder),
        "perplexities": stored.perplexities(measurements, folder),
        "decoding": stored.decoding(measurements, folder),
        "best": [],
    }


def check_protocols(rows: Sequence[Row]) -> None:
    """Raise `OptionError`, naming two models and what parts them, unless all measured models were measured alike."""
    for one, other in combinations([row for row in rows if row["decoding"]], 2):
        if difference := stored.differences(one["decoding"], other["decoding"], stored.TIMING):
            raise OptionError(f"{one['folder']} and {other['folder']} were not timed alike: their {difference}.")
    measured = [row for row in rows if row["perplexities"]]
    for one, other in combinations(measured, 2):
        mine, theirs = one["perplexities"], other["perplexities"]
        message = f"{one['folder']} and {other['folder']} were not measured alike"
        if missing := sorted(mine.keys() ^ theirs.keys()):
            owner = one if missing[0] in mine else other
            raise OptionError(
                f"{message}: only {owner['folder']} has {plain(missing[0])}; measure both on the same corpora."
            )
        for corpus in mine:
            if difference := stored.differences(mine[corpus], theirs[corpus]):
                raise OptionError(
                    f"{message}: on {plain(corpus)} their {difference}; measure both with the same options."
                )


def loss(row: Row) -> float | None:
    """Mean over the corpora of the loss in nats per token; None for a model not measured, or with a loss not finite."""
    losses = [log(result["perplexity"]) for result in row["perplexities"].values()]
    return sum(losses) / len(losses) if losses and isfinite(sum(losses)) else None


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """For each point whether no other is at most as high in both coordinates and lower in one; None never is best."""

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    whole = [None if x is None or y is None else (x, y) for x, y in points]
    there = [point for point in whole if point is not None]
    return [point is not None and not any(beats(other, point) for other in there) for point in whole]


def _bytes(row: Row) -> float | None:
    return float(row["ledger"]["model_bytes_kept"])


def _slowness(row: Row) -> float | None:
    """Time of a token in parts of the dense model's, which took turns with it; None without a bench."""
    return None if row["decoding"] is None else 1 / float(row["decoding"]["speedup"])


def _page(rows: Sequence[Row]) -> str:
    plots = []
    for plot, cost, label, scale in (
        ("size", _bytes, "size of the weights, MB", 1e-6),
        ("speed", _slowness, "time of a token, dense = 1 (decode, batch 1)", 1.0),
    ):
        if dots := _dots(rows, plot, cost, scale):
            title = f"Loss against {plot}"
            plots.append((title, charts.scatter(dots, x_label=label, y_label="loss, nats per token")))
    corpora = list(dict.fromkeys(corpus for row in rows for corpus in row["perplexities"]))
    return render("compare.html", rows=rows, corpora=corpora, plots=plots, names=labels(rows))


def _dots(rows: Sequence[Row], plot: str, cost: Callable[[Row], float | None], scale: float) -> list[charts.Dot]:
    dots = []
    for row, name in zip(rows, labels(rows), strict=True):
        x, y = cost(row), loss(row)
        if x is not None and y is not None:
            dots.append(charts.Dot(x * scale, y, name, plot in row["best"]))
    return dots


def labels(rows: Sequence[Row]) -> list[str]:
    """The last part of each folder's path where that tells them apart, else the whole path."""
    last = [Path(row["folder"]).resolve().name for row in rows]
    return [name if last.count(name) == 1 else row["folder"] for name, row in zip(last, rows, strict=True)]
