"""Tasks of the LM Evaluation Harness, run through its own API on a model in memory."""

import contextlib
import io
import logging
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart.checkpoints import pretrained
from eckart.errors import DataError, OptionError
from eckart.support.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Zero-shot tasks of the tables of ASVD, SVD-LLM, D-Rank and Duo-SVD; their data come from the hub.
PAPERS = ("openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "mathqa")


@dataclass(frozen=True)
class TaskRun:
    """What to run: task names, a folder with more of them (YAML), the most documents of each task."""

    names: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    batch_size: int = 8


def make_run(tasks: Sequence[str], include_path: str | Path | None, limit: int | None) -> TaskRun:
    """Check the request; `papers` stands for the seven tasks of the papers. Raises `OptionError`."""
    names = [name for task in tasks for name in (PAPERS if task == "papers" else (task,))]
    if include_path is not None and not names:
        raise OptionError("include_path names a folder of tasks, but no task is asked for; name them with tasks.")
    if limit is not None and (limit < 1 or not names):
        raise OptionError(f"limit is {limit}, but must be at least 1 and needs tasks.")
    if include_path is not None and not Path(include_path).is_dir():
        raise OptionError(f"include_path {str(include_path)!r}: no such folder.")
    if names:
        require("eval", "eval with tasks", "lm_eval")
    return TaskRun(tuple(dict.fromkeys(names)), None if include_path is None else str(include_path), limit)


def run_tasks(run: TaskRun, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[dict[str, Any]]:
    """Plain data for each task (a group gives one for each member): metrics with standard errors, protocol.

    A metric is `{"value", "stderr", "higher_is_better"}`; `stderr` None where the harness has none.
    Raises `OptionError` for an unknown task, `DataError` when a task's data cannot be had.
    """
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=run.include_path)
        _check_names(run, manager.all_tasks)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=run.batch_size)
        try:
            output: Any = simple_evaluate(
                harness, tasks=list(run.names), task_manager=manager, limit=run.limit, log_samples=False,
                bootstrap_iters=1000,
            )  # fmt: skip
        except Exception as error:  # whatever the hub's libraries, the task's own code or the network raise
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise DataError(
                f"tasks {', '.join(run.names)}: cannot be run ({type(error).__name__}: {reason}); their data come "
                f"from the hub unless a YAML in include_path says otherwise."
            ) from error
    return [_row(task, output, run) for task in output["configs"]]


def _check_names(run: TaskRun, available: Sequence[str]) -> None:
    from difflib import get_close_matches

    for name in run.names:
        if name not in available and "*" not in name:
            close = get_close_matches(name, available, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "; `lm_eval ls tasks` lists those it ships."
            raise OptionError(f"unknown task {name!r}{hint}")


def _row(task: str, output: dict[str, Any], run: TaskRun) -> dict[str, Any]:
    figures, better = output["results"][task], output["higher_is_better"].get(task, {})
    metrics = {}
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or isinstance(value, str):
            continue
        stderr = figures.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else key
        metrics[label] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "higher_is_better": better.get(metric),
        }
    protocol = {
        "harness": f"lm-eval {metadata.version('lm_eval')}",
        "task_version": output["versions"].get(task),
        "output_type": output["configs"][task].get("output_type"),
        "shots": output["n-shot"].get(task),
        "documents": output["n-samples"][task]["effective"],
        "documents_in_all": output["n-samples"][task]["original"],
        "limit": run.limit,
        "batch_size": run.batch_size,
        "chat_template": False,
        "max_length": output.get("max_length"),
    }
    return {"task": task, "metrics": metrics, "protocol": protocol}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints, logs and draws bars; it also warns of what its own files do."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    bars: Any = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with contextlib.redirect_stdout(io.StringIO()), bars, warnings.catch_warnings(), pretrained.quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
