"""Stored results of `eckart eval --json` and `eckart bench --json`: read back, and compared by protocol."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.errors import DataError, OptionError
from eckart.support.not_finite import numbers

EVAL, BENCH = "eckart-eval", "eckart-bench"
# What has to be the same for two perplexities to mean the same. The name of the text is free: its hash decides.
PROTOCOL = ("tokens_hash", "length", "windows", "stride", "bos", "mean", "join", "seed", "dtype")
TIMING = ("against", "engine", "dtype", "device", "device_name", "threads", "prompt", "steps")


def read(path: str | Path) -> dict[str, Any]:
    """One stored result. Raises `DataError` when the file is not one."""
    path = Path(path)
    try:
        data = numbers(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: no such results file.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as results: {error}.") from None
    kind = data.get("format") if isinstance(data, dict) else None
    if kind not in (EVAL, BENCH):
        raise DataError(
            f"{path}: format is {kind!r}, but results are what `eckart eval --json` or `eckart bench --json` printed."
        )
    return dict(data)


def of_model(results: Iterable[Mapping[str, Any]], folder: str | Path, format: str) -> list[dict[str, Any]]:
    """The results of one format that are about the model in `folder`."""
    return [dict(result) for result in results if result["format"] == format and is_about(result, folder)]


def is_about(result: Mapping[str, Any], folder: str | Path) -> bool:
    """True when the model that a result names is this folder, however its path is written."""
    return Path(str(result.get("model"))).resolve() == Path(folder).resolve()


def perplexities(results: Iterable[Mapping[str, Any]], folder: str | Path) -> dict[str, dict[str, Any]]:
    """`{corpus: row}` of a model over its eval results. Raises `OptionError` for two rows of one corpus that differ."""
    rows: dict[str, dict[str, Any]] = {}
    for result in of_model(results, folder, EVAL):
        for row in result["results"]:
            if "perplexity" not in row:
                continue
            other = rows.setdefault(row["data"], dict(row))
            if difference := differences(other, row):
                raise OptionError(f"{folder}: has two results on {row['data']} whose {difference}; give one of them.")
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
                str(value)[:12] if key == "tokens_hash" else repr(value) for value in (first.get(key), second.get(key))
            )
            return f"{'token ids (tokens_hash)' if key == 'tokens_hash' else key} differ: {a} and {b}"
    return ""
