"""Perplexity and tasks with their whole protocol stated, dense beside compressed.

The protocol of the field (GPTQ, SVD-LLM, Basis Sharing): the test text joined and tokenised once,
non-overlapping windows of 2048 tokens, the tail dropped, `length - 1` predictions in each window,
`exp` of the mean negative log-likelihood over all predicted tokens. `mean="window"` is D-Rank's: the
tail is kept as a shorter window and the mean is taken over the windows' means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from eckart import checkpoint, data, dtypes, tasks
from eckart.errors import NumericalError, OptionError
from eckart.not_finite import exp
from eckart.progress import Progress, silent, track
from eckart.provenance import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tensor = torch.Tensor
Mean = Literal["token", "window"]


@dataclass(frozen=True)
class Perplexity:
    """`value = exp(nll)`, infinite beyond a float; `nll` in nats per token.

    `tokens` predicted tokens over `windows` windows.
    """

    value: float
    nll: float
    tokens: int
    windows: int


def perplexity(
    model: torch.nn.Module,
    windows: Sequence[Tensor],
    *,
    mean: Mean = "token",
    progress: Progress = silent,
    stage: str = "measure",
) -> Perplexity:
    """Perplexity of a causal language model on windows of token ids, each `[length]`.

    Raises `NumericalError` when a window's loss is not finite (published evaluators skip such
    windows silently).
    """
    sums, counts = [], []
    for number, window in enumerate(track(windows, stage, len(windows), progress)):
        nll = window_nll(model, window)
        if not torch.isfinite(nll):
            raise NumericalError(f"the loss of window {number} is {nll.item()}; evaluate in float32.")
        sums.append(nll)
        counts.append(len(window) - 1)
    totals, tokens = torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
    nll_mean = float(totals.sum() / tokens.sum() if mean == "token" else (totals / tokens).mean())
    return Perplexity(exp(nll_mean), nll_mean, int(tokens.sum()), len(windows))


@torch.inference_mode()
def window_nll(model: torch.nn.Module, window: Tensor) -> Tensor:
    """Summed negative log-likelihood of tokens 1.. of one window, float64 scalar on the CPU."""
    ids = window.to(next(model.parameters()).device)[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    total = torch.zeros((), dtype=torch.float64)
    for rows, labels in zip(torch.split(logits, 512), torch.split(ids[0, 1:], 512), strict=True):
        total += F.cross_entropy(rows.float(), labels, reduction="sum").double().cpu()
    return total


def evaluate(
    model: "str | Path | PreTrainedModel",
    *,
    against: "str | Path | PreTrainedModel | None" = None,
    data_specs: Sequence[str] | None = None,
    task_names: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    windows: int | None = None,
    length: int = 2048,
    seed: int | None = None,
    join: str = "\n\n",
    bos: str = "start",
    mean: Mean = "token",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a model, and the dense one beside it, on every corpus and task with one protocol.

    `data_specs` None means `wikitext2`, or no text when there are tasks. `task_names` are those of the LM
    Evaluation Harness, or `papers` for the seven of the papers; `include_path` is a folder with more tasks
    as YAML, `limit` the most documents of each. `windows` None means the whole text. Returns plain data:
    `results[i]` holds the corpus, `perplexity`, `dense_perplexity` (with `against`), and the protocol
    with the hash of the token ids; `tasks[i]` the task, `metrics`, `dense_metrics` and the protocol;
    `provenance` what the checkpoint says of how it was made. Raises `OptionError` for an unknown option
    or task, or a missing extra `eval`, and `DataError` when data cannot be had.
    """
    if mean not in ("token", "window"):
        raise OptionError(f"mean is {mean!r}, but must be 'token' or 'window'.")
    run = tasks.make_run(task_names, include_path, limit)
    if data_specs is None:
        data_specs = () if run.names else ("wikitext2",)
    tokenizer = tokenizer or checkpoint.load_tokenizer(_path(model))
    corpora = [
        data.load_windows(
            spec, tokenizer, windows=windows, length=length, seed=seed, purpose="evaluation", join=join, bos=bos
        )
        for spec in data_specs
    ]
    measure = partial(_measure, corpora=corpora, run=run, tokenizer=tokenizer, mean=mean, device=device, dtype=dtype)
    measured = measure(model, progress=progress, stage="measure")
    dense = None if against is None else measure(against, progress=progress, stage="measure dense")
    protocol = {"mean": mean, "stride": length, "dtype": measured.dtype, "device": device}
    if dense is not None and dense.dtype != measured.dtype:
        protocol["dense_dtype"] = dense.dtype
    results = []
    for number, (spec, corpus) in enumerate(zip(data_specs, corpora, strict=True)):
        row = {"data": spec, **_figures(measured.perplexities[number])}
        if dense is not None:
            row |= {f"dense_{key}": value for key, value in _figures(dense.perplexities[number]).items()}
        results.append({**row, "protocol": {**protocol, **corpus.recipe.to_dict()}})
    task_rows = []
    for number, task in enumerate(measured.tasks):
        beside = {} if dense is None else {"dense_metrics": dense.tasks[number]["metrics"]}
        computed = {key: value for key, value in protocol.items() if key.endswith(("dtype", "device"))}
        task_rows.append({**task, **beside, "protocol": {**computed, **task["protocol"]}})
    return {
        "format": "eckart-eval",
        "version": 1,
        "model": _label(model),
        "against": None if against is None else _label(against),
        "results": results,
        "tasks": task_rows,
        "provenance": _provenance(model),
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Measured:
    """The figures of one model on every corpus and task, and the dtype it computed in."""

    perplexities: list[Perplexity]
    tasks: list[dict[str, Any]]
    dtype: str


def _measure(
    model: "str | Path | PreTrainedModel",
    *,
    corpora: Sequence[data.Windows],
    run: tasks.TaskRun,
    tokenizer: "PreTrainedTokenizerBase",
    mean: Mean,
    device: str,
    dtype: str,
    progress: Progress,
    stage: str,
) -> _Measured:
    """Load the model if it is a name, measure every corpus and task, let it go."""
    if isinstance(model, str | Path):
        loaded = checkpoint.load_model(str(model), device=device)
        dtypes.compute_in_(loaded, dtype)
    else:
        loaded = model
    loaded.eval()
    results = []
    for corpus in corpora:
        data.check_length(corpus, loaded)
        pieces = list(corpus.ids)
        if mean == "window" and len(corpus.tail) > 1:
            pieces.append(corpus.tail)
        results.append(perplexity(loaded, pieces, mean=mean, progress=progress, stage=stage))
    made = tasks.run_tasks(run, loaded, tokenizer) if run.names else []
    return _Measured(results, made, str(next(loaded.parameters()).dtype).removeprefix("torch."))


def _provenance(model: "str | Path | PreTrainedModel") -> dict[str, Any]:
    """What the checkpoint says of how it was made; empty for a dense model or one in memory."""
    return checkpoint.read_provenance(model) if isinstance(model, str | Path) and Path(model).is_dir() else {}


def _figures(result: Perplexity) -> dict[str, float]:
    return {"perplexity": result.value, "nll": result.nll, "tokens": result.tokens, "windows": result.windows}


def _path(model: "str | Path | PreTrainedModel") -> str:
    if isinstance(model, str | Path):
        return str(model)
    raise OptionError("a model in memory comes without its tokenizer; pass tokenizer=...")


def _label(model: "str | Path | PreTrainedModel") -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__
