"""Perplexity, KL divergence and tasks with their whole protocol stated, dense beside compressed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from eckart.checkpoints import checkpoint
from eckart.errors import ModelError, NumericalError, OptionError
from eckart.evaluation import tasks
from eckart.maths.divergence import from_log_probabilities
from eckart.measuring.perplexity import ROWS, Perplexity, nll_of, window_logits
from eckart.measuring.protocol import Mean, Protocol, ProtocolOptions
from eckart.model.walk import predicts_tokens
from eckart.progress import Progress, silent, track
from eckart.support import dtypes
from eckart.support.devices import check_device
from eckart.support.versions import versions
from eckart.text import data
from eckart.text.fit import check_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE = "The cat sat on  the mat,\n\tand 12345 others: naïve, don't; 東京! https://example.org/a_b?c=d"


def evaluate(
    model: "str | Path | PreTrainedModel",
    *,
    against: "str | Path | PreTrainedModel | None" = None,
    data_specs: Sequence[str] | None = None,
    task_names: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Unpack[ProtocolOptions],
) -> dict[str, Any]:
    """Measure a model, and the dense one beside it, on every corpus and task with one protocol.

    `data_specs` None means `wikitext2`, or no text when there are tasks. `task_names` are those of the LM
    Evaluation Harness, or `papers` for the seven of the papers; `include_path` is a folder with more tasks
    as YAML, `limit` the most documents of each. `tokenizer` is one, or the name of one, in place of the model's own.
    `options` are the fields of `eckart.measuring.protocol.Protocol`:
    `windows` (None: the whole text), `length`, `seed`, `join`, `bos`, `mean`, `device`, `dtype`. Returns plain data:
    `results[i]` holds the corpus, `perplexity`, with `against` also `dense_perplexity` and `kl`, the KL divergence
    of the predictions from the dense model's in nats per token, and the protocol with the hash of the token ids;
    `tasks[i]` the task, `metrics`, `dense_metrics` and the protocol; `provenance` what the checkpoint says of how it
    was made. Raises `OptionError` for an unknown option or task, a missing extra `eval` or an `against` with another
    vocabulary, and `DataError` when data cannot be had.
    """
    protocol = Protocol(**options)
    run = tasks.make_run(task_names, include_path, limit)
    if data_specs is None:
        data_specs = () if run.names else ("wikitext2",)
    check_device(protocol.device)
    if tokenizer is None or isinstance(tokenizer, str):
        given, tokenizer = tokenizer, checkpoint.load_tokenizer(tokenizer or _path(model), trust_remote_code)
        if given is None and isinstance(against, str | Path):
            _check_tokenizers(tokenizer, against)
    corpora = [protocol.corpus(spec, tokenizer) for spec in data_specs]
    compressed = _loaded(model, protocol, trust_remote_code)
    dense = None if against is None else _loaded(against, protocol, trust_remote_code)
    figures = [_measure(compressed, dense, corpus, protocol, progress) for corpus in corpora]
    settings = protocol.to_dict(_dtype(compressed))
    if dense is not None and _dtype(dense) != _dtype(compressed):
        settings["dense_dtype"] = _dtype(dense)
    results = [
        {"data": spec, **row, "protocol": {**settings, **corpus.recipe.to_dict()}}
        for spec, row, corpus in zip(data_specs, figures, corpora, strict=True)
    ]
    return {
        "format": "eckart-eval",
        "version": 1,
        "model": _label(model),
        "against": None if against is None else _label(against),
        "results": results,
        "tasks": _tasks(run, compressed, dense, tokenizer, settings),
        "provenance": _provenance(model),
        "versions": versions(),
    }


def _check_tokenizers(tokenizer: "PreTrainedTokenizerBase", against: str | Path) -> None:
    """Raise `OptionError` when the dense model reads text as other tokens: losses per token would not compare."""
    try:
        other = checkpoint.load_tokenizer(against)
    except ModelError:
        return  # a folder of weights alone; that its vocabulary fits is checked on the first window
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs or tokenizer(PROBE)["input_ids"] != other(PROBE)["input_ids"]:
        differ = sum(ours.get(token) != theirs.get(token) for token in {*ours, *theirs})
        how = f"{differ:,} of its tokens are others" if differ else "it cuts text otherwise"
        raise OptionError(
            f"against is {str(against)!r}, whose tokenizer is not the model's ({how}), so losses per token do not "
            "compare; give the dense model that it was made from."
        )


def _loaded(model: "str | Path | PreTrainedModel", protocol: Protocol, trust_remote_code: bool) -> "PreTrainedModel":
    """A model by name on the protocol's device and in its dtype; one in memory as it is."""
    if isinstance(model, str | Path):
        loaded = checkpoint.load_model(str(model), device=protocol.device, trust_remote_code=trust_remote_code)
        dtypes.compute_in_(loaded, protocol.dtype)
    else:
        loaded = model
    if not predicts_tokens(loaded):
        raise OptionError(f"{type(loaded).__name__} gives no logits of a next token, so its losses cannot be measured.")
    return loaded.eval()


def _measure(
    compressed: "PreTrainedModel",
    dense: "PreTrainedModel | None",
    corpus: data.Windows,
    protocol: Protocol,
    progress: Progress,
) -> dict[str, float]:
    """The figures of one corpus, both models side by side on each window."""
    models = [compressed] if dense is None else [compressed, dense]
    for model in models:
        check_fit(corpus, model)
    pieces = list(corpus.ids)
    if protocol.mean == "window" and len(corpus.tail) > 1:
        pieces.append(corpus.tail)
    sums: list[list[Tensor]] = [[] for _ in models]
    divergences: list[Tensor] = []
    for window in track(pieces, "measure", len(pieces), progress):
        logits = [window_logits(model, window) for model in models]
        for model_sums, model_logits in zip(sums, logits, strict=True):
            model_sums.append(nll_of(model_logits, window))
        if dense is not None:
            divergences.append(_divergence(*logits))
    counts = [len(window) - 1 for window in pieces]
    figures = _figures(Perplexity.of(sums[0], counts, protocol.mean))
    if dense is not None:
        dense_figures = _figures(Perplexity.of(sums[1], counts, protocol.mean))
        figures |= {f"dense_{key}": value for key, value in dense_figures.items()}
        figures["kl"] = _mean(divergences, counts, protocol.mean)
    return figures


@torch.inference_mode()
def _divergence(candidate: Tensor, expected: Tensor) -> Tensor:
    """KL(dense || compressed) in nats, summed over the tokens of a window, from logits `[tokens, vocabulary]`."""
    if candidate.shape != expected.shape:
        raise OptionError(
            f"against has a vocabulary of {expected.shape[-1]} tokens, but the model one of {candidate.shape[-1]}; "
            "give the dense model that it was made from."
        )
    total = torch.zeros((), dtype=torch.float64)
    for ours, theirs in zip(
        torch.split(candidate, ROWS), torch.split(expected.to(candidate.device), ROWS), strict=True
    ):
        of_tokens = from_log_probabilities(theirs.float().log_softmax(-1), ours.float().log_softmax(-1))
        total += of_tokens.double().sum().cpu()
    return total


def _mean(sums: Sequence[Tensor], counts: Sequence[int], mean: Mean) -> float:
    """Nats per token, in the protocol's mean. Raises `NumericalError` for what is not finite."""
    totals, tokens = torch.stack(list(sums)), torch.tensor(counts, dtype=torch.float64)
    if not torch.isfinite(totals).all():
        raise NumericalError("the KL divergence from the dense model is NaN or infinite; evaluate in float32.")
    return float(totals.sum() / tokens.sum() if mean == "token" else (totals / tokens).mean())


def _tasks(
    run: tasks.TaskRun,
    compressed: "PreTrainedModel",
    dense: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for each task, with the dense model's metrics beside."""
    if not run.names:
        return []
    rows = tasks.run_tasks(run, compressed, tokenizer)
    dense_rows = [] if dense is None else tasks.run_tasks(run, dense, tokenizer)
    computed = {key: value for key, value in settings.items() if key.endswith(("dtype", "device"))}
    return [
        {
            **row,
            **({"dense_metrics": dense_rows[number]["metrics"]} if dense_rows else {}),
            "protocol": {**computed, **row["protocol"]},
        }
        for number, row in enumerate(rows)
    ]


def _dtype(model: "PreTrainedModel") -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


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
