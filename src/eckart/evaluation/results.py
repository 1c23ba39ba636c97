"""Stored results of `eckart eval --json` and `eckart bench --json`: read back, and compared by protocol."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from eckart.errors import DataError, OptionError
from eckart.support import reading
from eckart.support.escaping import plain
from eckart.support.reading import Count, Positive

EVAL, BENCH = "eckart-eval", "eckart-bench"
# What has to be the same for two perplexities to mean the same. The name of the text is free: its hash decides.
PROTOCOL = ("tokens_hash", "length", "windows", "stride", "bos", "mean", "join", "seed", "dtype")
TIMING = ("against", "engine", "dtype", "device", "device_name", "threads", "prompt", "steps")


def read(path: str | Path) -> dict[str, Any]:
    """One stored result. Raises `DataError` when the file is not one."""
    return checked(reading.read_json(Path(path), DataError, "results file"), path)


def checked(data: Any, source: object) -> dict[str, Any]:
    """Plain data as a stored result: what pages and comparisons look at is there and of its type."""
    kind = data.get("format") if isinstance(data, Mapping) else None
    shapes: dict[Any, type[msgspec.Struct]] = {EVAL: _Eval, BENCH: _Bench}
    if not isinstance(kind, str) or kind not in shapes:
        raise DataError(
            f"{plain(source, 1000)}: format is {reading.shown(kind)}, but results are what `eckart eval --json` or "
            "`eckart bench --json` printed."
        )
    reading.checked(data, shapes[kind], DataError, source)
    return dict(data)


class _Protocol(msgspec.Struct):
    """What a page says of how a perplexity was measured."""

    tokens_hash: str
    length: Count
    stride: Count
    bos: str
    mean: str
    join: str
    dtype: str
    device: str


class _Measured(msgspec.Struct):
    """The figures of one text."""

    data: str = ""
    perplexity: Annotated[float, msgspec.Meta(gt=0)] | msgspec.UnsetType = msgspec.UNSET
    dense_perplexity: Annotated[float, msgspec.Meta(gt=0)] | None = None
    nll: float | None = None
    dense_nll: float | None = None
    kl: float | None = None
    windows: Count | None = None
    protocol: _Protocol | None = None

    def __post_init__(self) -> None:
        if self.perplexity is not msgspec.UNSET and (not self.data or self.protocol is None):
            raise ValueError("a perplexity needs its data and its protocol beside it")


class _Score(msgspec.Struct):
    value: float
    stderr: float | None = None


class _Task(msgspec.Struct):
    task: str
    metrics: dict[str, _Score]
    dense_metrics: dict[str, _Score] = {}


class _Eval(msgspec.Struct):
    model: str
    results: list[_Measured]
    tasks: list[_Task] = []
    version: Literal[1] = 1


class _Phase(msgspec.Struct):
    speedup: Annotated[float, msgspec.Meta(ge=1e-9, le=1e9)]
    speedup_low: float
    speedup_high: float
    limit: float
    tokens_per_second: float
    seconds: float
    dense_tokens_per_second: float
    dense_seconds: float


class _Timed(msgspec.Struct):
    batch: Positive
    prompt: Positive
    prefill: _Phase
    decode: _Phase


class _Peaks(msgspec.Struct):
    compressed: Count | None = None
    dense: Count | None = None


class _Bench(msgspec.Struct):
    model: str
    rows: Annotated[list[_Timed], msgspec.Meta(min_length=1)]
    engine: str
    dtype: str
    threads: Count
    device_name: str
    repeats: Count
    slower: list[str]
    reasons: list[str]
    peak_bytes: _Peaks | None = None
    version: Literal[1] = 1


def of_model(results: Iterable[Mapping[str, Any]], folder: str | Path, format: str) -> list[dict[str, Any]]:
    """The results of one format that are about the model in `folder`."""
    return [dict(result) for result in results if result["format"] == format and is_about(result, folder)]


def is_about(result: Mapping[str, Any], folder: str | Path) -> bool:
    """True when the model that a result names is this folder, however its path is written."""
    try:
        return Path(str(result.get("model"))).resolve() == Path(folder).resolve()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a circle of links
        return False


def perplexities(results: Iterable[Mapping[str, Any]], folder: str | Path) -> dict[str, dict[str, Any]]:
    """`{corpus: row}` of a model over its eval results. Raises `OptionError` for two rows of one corpus that differ."""
    rows: dict[str, dict[str, Any]] = {}
    for result in of_model(results, folder, EVAL):
        for row in result["results"]:
            if "perplexity" not in row:
                continue
            other = rows.setdefault(row["data"], dict(row))
            if difference := differences(other, row):
                text = plain(row["data"])
                raise OptionError(f"{folder}: has two results on {text} whose {difference}; give one of them.")
    return rows


def decoding(results: Iterable[Mapping[str, Any]], folder: str | Path) -> dict[str, Any] | None:
    """How fast a model writes one text at a time, by its bench results: figures and protocol; None without any.

    Raises `OptionError` for two results that were not timed alike.
    """
    first: dict[str, Any] | None = None
    for result in of_model(results, folder, BENCH):
        for row in result["rows"]:
            if row["batch"] == 1:
                protocol = {key: result.get(key, row.get(key)) for key in TIMING}
                other = {"protocol": protocol, **row["decode"]}
                first = first or other
                if difference := differences(first, other, TIMING):
                    raise OptionError(f"{folder}: was timed twice, and their {difference}; give one of the results.")
    return first


def differences(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str] = PROTOCOL) -> str:
    """Where the protocols of two rows part ways, in words; empty when they agree."""
    first, second = one["protocol"], other["protocol"]
    for key in keys:
        if first.get(key) != second.get(key):
            a, b = (
                plain(str(value)[:12]) if key == "tokens_hash" else reading.shown(value)
                for value in (first.get(key), second.get(key))
            )
            return f"{'token ids (tokens_hash)' if key == 'tokens_hash' else key} differ: {a} and {b}"
    return ""
