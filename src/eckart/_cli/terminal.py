"""What a person sees: progress bars, lines and tables, on standard error and standard output.

`say`, `table` and the log are the only ways out, and all three take text as data: there is no markup in it, and what
is invisible in it is written out.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from eckart._cli import streams
from eckart.progress import Progress, silent
from eckart.support.escaping import plain
from eckart.support.not_finite import exp

if TYPE_CHECKING:  # these import torch, which would make `eckart --help` wait
    from eckart.checkpoints.verification import Verification
    from eckart.demo.run import DemoReport
    from eckart.ledger import Ledger
    from eckart.model.discovery import Layout
    from eckart.plans.plan import Plan

LIMIT = 10_000  # characters of a line: beyond what any of ours has


def _console(stream: streams.Stream) -> Console:
    return Console(file=cast(IO[str], stream), markup=False, emoji=False, highlight=False, soft_wrap=True)


_out, _err = _console(streams.stdout), _console(streams.stderr)


def say(text: str = "", style: str | None = None) -> None:
    """One line on standard output."""
    _out.print(plain(text, LIMIT), style=style)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """One bar for each stage, with steps done and time left; nothing at all when piped or quiet."""
    if quiet or not streams.stderr.isatty():
        yield silent
        return
    columns = (
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=_err) as bars:
        current: dict[str, TaskID] = {}

        def listen(stage: str, done: int, total: int) -> None:
            if total == 0:  # nothing to do: no bar
                return
            if stage not in current or done == 0:
                current[stage] = bars.add_task(stage, total=total)
            bars.update(current[stage], completed=done)

        yield listen


class _Lines(logging.Handler):
    """Log lines on standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _err.print(self.format(record))


class _Plain(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = plain(record.message, LIMIT)
        return super().formatMessage(record)


def log_to_stderr(level: int | None = None) -> None:
    """Show the library's warnings on standard error; with a level all from there on, with time and module."""
    handler = _Lines()
    handler.setFormatter(_Plain("eckart: %(message)s"))
    logger = logging.getLogger("eckart")
    logger.handlers = [handler]
    if level is not None:
        handler.setFormatter(_Plain("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.setLevel(level)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], justify: JustifyMethod = "right") -> None:
    """Print a table; every column but the first is aligned as `justify` says, numbers to the right."""
    grid = Table(title=plain(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        grid.add_column(plain(column), justify="left" if number == 0 else justify, overflow="fold")
    for row in rows:
        grid.add_row(*(plain(cell, LIMIT) for cell in row))
    _out.print(grid)
    _out.print()


def show_layout(layout: "Layout") -> None:
    """What is covered; targets by block and kind with shapes and shares; what is left alone, why, and its share."""
    from eckart.model.discovery import skipped_by_reason

    show_coverage(layout)
    total = layout.parameters
    kinds: dict[tuple[str, int, int], list[int]] = {}
    for target in layout.targets:
        kinds.setdefault((target.kind, target.out_features, target.in_features), []).append(target.block)
    rows = [
        (kind, f"{rows} x {columns}", blocks_text(blocks), f"{len(blocks) * rows * columns:,}",
         share_text(len(blocks) * rows * columns, total))
        for (kind, rows, columns), blocks in kinds.items()
    ]  # fmt: skip
    rows.append(("all targets", "", "", f"{layout.target_parameters:,}", share_text(layout.target_parameters, total)))
    table(f"Targets in {layout.blocks}", ("kind", "out x in", "blocks", "parameters", "of the model"), rows)
    left = [(reason, f"{n:,}", share_text(n, total)) for reason, n in skipped_by_reason(layout).items()]
    table("Left as it is", ("reason", "parameters", "of the model"), left)


def show_spectra(rows: Sequence[dict[str, Any]]) -> None:
    """The densities of each module, or group of modules, in the metric of the recipe."""
    columns = ("energy_effective_rank", "effective_rank", "stable_rank", "rank_at_95")
    cells = [
        (
            row["targets"][0] + (f" and {len(row['targets']) - 1} more" if len(row["targets"]) > 1 else ""),
            f"{row['out']} x {row['in']}",
            *(f"{row[name]:.1f}" for name in columns),
        )
        for row in rows
    ]
    heads = ("module", "out x in", "energy eff. rank", "effective rank", "stable rank", "rank at 95 %")
    table("Spectra", heads, cells)


def show_coverage(layout: "Layout") -> None:
    """How much of the blocks the targets are, and why the rest is left alone, as one line."""
    say(f"{layout.coverage[0].upper()}{layout.coverage[1:]}.")


def show_ledger(ledger: "Ledger") -> None:
    """Parameters and bytes before and after, of the targets and of the whole model."""
    rows = [
        ("targets, parameters", f"{ledger.target_parameters_dense:,}", f"{ledger.target_parameters_kept:,}",
         f"{ledger.keep:.2%}"),
        ("model, parameters", f"{ledger.model_parameters_dense:,}", f"{ledger.model_parameters_kept:,}",
         f"{ledger.keep_model:.2%}"),
        ("model, MB", f"{ledger.model_bytes_dense / 1e6:,.1f}", f"{ledger.model_bytes_kept / 1e6:,.1f}",
         f"{ledger.model_bytes_kept / ledger.model_bytes_dense:.2%}"),
    ]  # fmt: skip
    table("Ledger", ("", "dense", "compressed", "kept"), rows)


def show_reached(plan: "Plan") -> None:
    """What a plan asks and reaches, before any weight is touched."""
    goal = ", ".join(f"{k} {v:g}" for k, v in plan.asked.items() if isinstance(v, int | float))
    reached = plan.reached
    text = f"Asked: {goal}. Plan: keep {reached['keep']:.4f}, model {reached['model_bytes_kept'] / 1e6:,.1f} MB"
    if (bits := reached.get("bits")) is not None:
        text += f", {bits:.3f} bits per weight of the targets"
    if (kl := reached.get("predicted_kl")) is not None:
        text += f", predicted KL {kl:.4f} nats per token (perplexity x{exp(kl):.3f})"
    if (kl := reached.get("measured_kl")) is not None:
        text += f", measured {kl:.4f}"
    say(f"{text}.")


def show_kl(kl: dict[str, Any]) -> None:
    """The KL divergence of the finished model beside the prediction for the plan, and on which text."""
    text = "that calibration did not see" if kl["unseen"] else "of the calibration (the text had no more)"
    predicted = "" if kl["predicted"] is None else f", {kl['predicted']:.4f} predicted for the plan"
    say(
        f"KL from the dense model: {kl['measured']:.4f} nats per token measured{predicted}; "
        f"{kl['windows']} x {kl['length']} tokens {text}."
    )


def show_text(recipe: dict[str, Any]) -> None:
    """What was calibrated on: every source, its column if it is a table, and how that became text."""
    for part in recipe["parts"]:
        column = f", column {part['column']!r} by {part['rendering']}" if part["column"] else ""
        say(f"Text: {part['source']}{column}; {part['windows']} x {recipe['length']} tokens, {part['reading']}.")


def show_drift(drift: dict[str, Any]) -> None:
    """Whether the calibration was long enough: how far the metric still moved."""
    say(
        f"Over the last quarter of the calibration the metric moved by {drift['median']:.1%} (median of the matrices; "
        f"{drift['most']:.1%} for {drift['most_of']}). It moves less with more windows."
    )


def show_results(result: dict[str, Any]) -> None:
    """Perplexity on every corpus and the metrics of every task, dense beside compressed, with the protocols."""
    rows = []
    for row in result["results"]:
        dense = row.get("dense_perplexity")
        kl = f"{row['kl']:.4f}" if "kl" in row else "-"
        cells = (f"{dense:.2f}", f"{row['perplexity'] / dense:.3f}", kl) if dense else ("-", "-", "-")
        rows.append(
            (row["data"], f"{row['windows']} x {row['protocol']['length']}", f"{row['perplexity']:.2f}", *cells)
        )
    if rows:
        table("Perplexity", ("corpus", "windows", "compressed", "dense", "ratio", "KL, nats per token"), rows)
        first = result["results"][0]["protocol"]
        say(
            f"Protocol: windows of {first['length']} tokens, stride {first['stride']}, joined by {first['join']!r}, "
            f"BOS {first['bos']}, mean over {first['mean']}s, dtype {first['dtype']}, {first['device']}."
        )
    if result["tasks"]:
        show_tasks(result["tasks"])


def show_tasks(tasks: Sequence[dict[str, Any]]) -> None:
    """Every metric of every task with its standard error."""
    rows = []
    for task in tasks:
        for name, metric in task["metrics"].items():
            dense_metric = task.get("dense_metrics", {}).get(name)
            documents = f"{task['protocol']['documents']} of {task['protocol']['documents_in_all']}"
            rows.append((task["task"], documents, name, metric_text(metric), metric_text(dense_metric)))
    table("Tasks", ("task", "documents", "metric", "compressed", "dense"), rows)
    first = tasks[0]["protocol"]
    say(f"Protocol: {first['harness']}, dtype {first['dtype']}, {first['device']}, no chat template.")


def metric_text(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "-"
    error = f" ± {metric['stderr']:.4f}" if metric["stderr"] is not None else ""
    return f"{metric['value']:.4f}{error}"


def show_bench(result: dict[str, Any]) -> None:
    """Speed of every batch, dense beside compressed and beside the limit; why it is slow where it is."""
    rows = []
    for row in result["rows"]:
        for phase in ("prefill", "decode"):
            figures = row[phase]
            spread = f"{figures['speedup_low']:.2f}-{figures['speedup_high']:.2f}"
            rows.append(
                (f"{phase}, batch {row['batch']}", f"{figures['tokens_per_second']:,.1f}",
                 f"{figures['dense_tokens_per_second']:,.1f}", f"{figures['speedup']:.2f}", spread,
                 f"{figures['limit']:.2f}", f"{figures['of_limit']:.0%}",
                 f"{figures['limit_with_rest']:.2f}" if "limit_with_rest" in figures else "-")
            )  # fmt: skip
        first = row["prefill"]
        rows.append(
            (f"first token, batch {row['batch']}", f"{first['seconds'] * 1e3:,.1f} ms",
             f"{first['dense_seconds'] * 1e3:,.1f} ms", "", "", "", "", "")
        )  # fmt: skip
    heads = ("", "compressed", "dense", "speed-up", "quartiles", "limit", "of the limit", "limit with the rest")
    table("Tokens per second", heads, rows)
    peak = result["peak_bytes"]
    if peak.get("compressed") and peak.get("dense"):
        say(f"Peak memory: {peak['compressed'] / 1e6:,.0f} MB, dense {peak['dense'] / 1e6:,.0f} MB.")
    say("Limit: multiply-adds (prefill) or bytes read (decode), dense over compressed; with the rest: as far")
    say("as the time goes into products at all.")
    say(
        f"{result['engine']}, {result['dtype']}, {result['device']}, {result['threads']} threads, "
        f"prompt {result['rows'][0]['prompt']}, median of {result['repeats']} turns."
    )
    if result["slower"]:
        say(f"Slower than dense: {', '.join(result['slower'])}.", style="bold")
    for reason in result["reasons"]:
        say(f"- {reason}")


def show_verification(found: "Verification") -> None:
    """Every file that is not as it was saved, and the sum of it."""
    rows = [(file.file, file.state) for file in found.files if file.state != "as saved"]
    if rows:
        table("Files", ("file", "state"), rows, justify="left")
    if found.whole:
        say(f"{found.folder}: {len(found.files)} files, {'recorded as they are' if found.accepted else 'as saved'}.")


def show_comparison(comparison: dict[str, Any]) -> None:
    """A row a model; a star for each plot on which no other beats it."""
    from eckart.pages.comparison import labels

    models = comparison["models"]
    corpora = list(dict.fromkeys(corpus for row in models for corpus in row["perplexities"]))
    rows = []
    for row, name in zip(models, labels(models), strict=True):
        book, perplexities = row["ledger"], [row["perplexities"].get(corpus) for corpus in corpora]
        speed = row["decoding"]
        rows.append(
            (name, row["recipe"], f"{book['keep']:.2%}", f"{book['model_bytes_kept'] / 1e6:,.1f}",
             *(f"{one['perplexity']:.2f}" if one else "-" for one in perplexities),
             f"{speed['tokens_per_second']:,.1f}" if speed else "-", f"{speed['speedup']:.2f}" if speed else "-",
             " ".join(row["best"]) or "-")
        )  # fmt: skip
    heads = ("model", "recipe", "kept", "MB", *(f"perplexity, {Path(corpus).name}" for corpus in corpora))
    table("Compared", (*heads, "tokens/s", "speed-up", "best by loss and"), rows)
    if page := comparison.get("page"):
        say(f"Page: {page}")


def blocks_text(blocks: Sequence[int]) -> str:
    """`0-29` for a run without gaps, else a count."""
    blocks = sorted(set(blocks))  # experts of one block are of one kind
    gapless = blocks == list(range(blocks[0], blocks[-1] + 1))
    if len(blocks) == 1:
        return str(blocks[0])
    return f"{blocks[0]}-{blocks[-1]}" if gapless else f"{len(blocks)} of {blocks[0]}-{blocks[-1]}"


def share_text(part: int, total: int) -> str:
    return f"{part / total:.1%}"


def show_demo(report: "DemoReport") -> None:
    """The demo's report."""
    show_ledger(report.ledger)
    show_results(report.evaluation)
    say()
    say(f"{report.prompt} ...", style="bold")
    for label, text in report.samples.items():
        say(f"  {label:<11}{' '.join(text.split())}")
    say()
    say(f"Dense model       {report.dense_folder}")
    say(f"Compressed model  {report.compressed_folder}")
    say(f"Report            {report.page}")
    say(f"Took {report.seconds / 60:.1f} minutes. Next: eckart inspect, eckart compress, eckart eval (--help).")
