"""Where text comes from: a `--data` spec names sources, each read into documents.

The forms of a spec are listed in `eckart.text.data`.
"""

import contextlib
import difflib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eckart.errors import DataError

Purpose = Literal["calibration", "evaluation"]
Kind = Literal["hub", "file", "python-docs", "self"]

KNOWN = ("wikitext2", "ptb", "c4", "python-docs", "self")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
HALVES = {"calibration": "first", "evaluation": "second"}

_FILE = re.compile(r"(?P<name>.*\.(?:txt|jsonl|json|parquet))(?::(?P<column>[^:]*))?")
_BRACKETS = r"(?![^\[]*\])"  # not inside a slice such as train[:10%]


@dataclass(frozen=True)
class SourceSpec:
    """One source of a spec, as parsed; an empty field means the default. `windows` is its count, if it has one."""

    kind: Kind
    name: str
    config: str = ""
    split: str = ""
    column: str = ""
    windows: int | None = None


@dataclass(frozen=True)
class Source:
    """The documents of a source; None is a row without a text."""

    documents: Sequence[str | None]
    split: str
    rows_apart: bool  # rows are texts of their own: a part of them will do, in any order


def parse_spec(spec: str) -> list[SourceSpec]:
    """The sources of a spec, in order. Raises `DataError` for an empty one, too many fields or a count of 0."""
    return [_parse_source(text.strip(), spec) for text in re.split("," + _BRACKETS, spec)]


def _parse_source(text: str, spec: str) -> SourceSpec:
    counted = re.fullmatch(r"(.*):(\d+)", text)
    source, windows = (counted[1], int(counted[2])) if counted else (text, None)
    if windows == 0:
        raise DataError(f"{text}: asks for 0 windows; a count must be positive.")
    if file := _FILE.fullmatch(source):
        if file["column"] and file["name"].endswith(".txt"):
            raise DataError(f"{source}: a .txt file has no columns; name it without {':' + file['column']!r}.")
        return SourceSpec("file", file["name"], column=file["column"] or "", windows=windows)
    name, *fields = re.split(":" + _BRACKETS, source)
    if not name:
        raise DataError(f"{spec!r}: a source has no name; write SOURCE or SOURCE:WINDOWS, with commas between.")
    if name == "python-docs" and (not fields or fields in (["first"], ["second"], ["all"])):
        return SourceSpec("python-docs", name, split=fields[0] if fields else "", windows=windows)
    if name == "self" and not fields:
        return SourceSpec("self", name, windows=windows)
    if name in ("python-docs", "self"):
        raise DataError(f"{source}: write python-docs:first, python-docs:second, python-docs:all, or just {name}.")
    if len(fields) > 3:
        raise DataError(f"{source}: has {len(fields) + 1} fields; a corpus of the hub is name:config:split:column.")
    config, split, column = (*fields, "", "", "")[:3]
    return SourceSpec("hub", name, config, split, column, windows)


def label(spec: SourceSpec) -> str:
    """The part as it would be written, without its count."""
    fields = (spec.name, spec.config, spec.split, spec.column)
    return ":".join(fields).rstrip(":")


def read(spec: SourceSpec, purpose: Purpose) -> Source:
    """The documents of a source. Raises `DataError` that names it when it is unknown or unreadable."""
    if spec.kind == "python-docs":
        half = spec.split or HALVES[purpose]
        return Source(_python_docs(half), half, rows_apart=False)
    if spec.kind == "hub":
        return _read_hub(spec, purpose)
    path = Path(spec.name)
    try:
        if path.suffix == ".txt":
            return Source([path.read_bytes().decode()], "all", rows_apart=False)
        return Source(_read_table(path, spec.column), "all", rows_apart=True)
    except FileNotFoundError:
        raise DataError(_no_such(spec.name)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _no_such(name: str) -> str:
    """Names the nearest known source or file beside it, then all that is known."""
    folder = Path(name).parent
    beside = [str(file) for file in folder.iterdir() if file.suffix in ENDINGS] if folder.is_dir() else []
    close = difflib.get_close_matches(name, [*KNOWN, *beside], n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"{name}: no such file or corpus{hint} Known: {', '.join(KNOWN)}, a corpus of the hub as OWNER/NAME, "
        f"or a file that ends in {', '.join(ENDINGS)}."
    )


def _python_docs(half: str) -> list[str]:
    """The topics by name; the first half ends with the topic in which half of the characters are reached."""
    from pydoc_data.topics import topics  # a large module that most runs do not need

    texts = [text for _, text in sorted(topics.items())]
    total, seen, cut = sum(map(len, texts)), 0, 0
    while 2 * seen < total:
        seen += len(texts[cut])
        cut += 1
    return {"first": texts[:cut], "second": texts[cut:], "all": texts}[half]


def _read_table(path: Path, column: str) -> list[str | None]:
    """One column of a table, a text a row."""
    if path.suffix == ".parquet":
        return _read_parquet(path, column)
    text = path.read_bytes().decode()
    if path.suffix == ".json":
        listed = _parse_json(text, str(path))
        if not isinstance(listed, list):
            raise DataError(f"{path}: is not a list of rows; if it holds one row a line, call it .jsonl.")
        rows = [(f"{path} row {number}", row) for number, row in enumerate(listed, 1)]
    else:  # only "\n" ends a row: splitlines() would also split at separators that JSON allows inside strings
        lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
        rows = [(place, _parse_json(line, place)) for place, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: is empty; give a text.")
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f'{place}: is not an object such as {{"text": "..."}}.')
    strings = [key for key, value in rows[0][1].items() if isinstance(value, str)]
    column = _choose_column(str(path), column, list(rows[0][1]), strings)
    for place, row in rows:
        if not isinstance(row.get(column), str | None):
            raise DataError(f"{place}: {column!r} is {row[column]!r}, but must be a string.")
    return [row.get(column) for _, row in rows]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON: {error}.") from None


def _read_parquet(path: Path, column: str) -> list[str | None]:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets; slow to import
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        schema = pyarrow.parquet.read_schema(path)
        strings = [field.name for field in schema if str(field.type) in ("string", "large_string")]
        column = _choose_column(str(path), column, schema.names, strings)
        texts: list[str | None] = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as parquet: {_first_line(error)}.") from None
    return texts


def _choose_column(name: str, column: str, columns: Sequence[str], strings: Sequence[str]) -> str:
    """The column asked for, else `text`, else the only one of strings."""
    if column:
        if column not in strings:
            raise DataError(f"{name}: has no column {column!r} of strings; its columns are {', '.join(columns)}.")
        return column
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise DataError(
            f"{name}: has no column 'text' and {len(strings)} columns of strings; "
            f"choose one by name, {name}:COLUMN. Its columns are {', '.join(columns)}."
        )
    return strings[0]


def _read_hub(spec: SourceSpec, purpose: Purpose) -> Source:
    """A corpus of the hub, or of a local folder in its layout."""
    if Path(spec.name).is_file():
        raise DataError(f"{spec.name}: the name of a file must end in {', '.join(ENDINGS)}.")
    if spec.name not in KNOWN and difflib.get_close_matches(spec.name, KNOWN, cutoff=0.7):
        raise DataError(_no_such(spec.name))  # a slip of the pen; asking the hub would take half a minute
    split = spec.split or {"calibration": "train", "evaluation": "test"}[purpose]
    path, config, column = spec.name, spec.config or None, spec.column
    options: dict[str, Any] = {}
    if spec.name == "wikitext2":
        path, config, column = "Salesforce/wikitext", config or "wikitext-2-raw-v1", column or "text"
    elif spec.name == "ptb":
        path, column = "ptb-text-only/ptb_text_only", column or "sentence"
        options = {"revision": "refs/convert/parquet"}  # the original is a script, which datasets no longer runs
    elif spec.name == "c4":
        split = "validation" if split == "test" else split
        shard = "c4-train.00000-of-01024" if split.startswith("train") else "c4-validation.00000-of-00008"
        path, column = "allenai/c4", column or "text"
        options = {"data_files": {split.partition("[")[0]: f"en/{shard}.json.gz"}}
    dataset = _load_dataset(spec.name, path, config, split, options)
    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", "").endswith("string")]
    texts = dataset[_choose_column(label(spec), column, dataset.column_names, strings)]
    return Source(texts, split, rows_apart=spec.name not in ("wikitext2", "ptb"))


def _load_dataset(name: str, path: str, config: str | None, split: str, options: dict[str, Any]) -> Any:
    import datasets  # slow to import, and most runs read a file

    try:
        with _without_retry_messages():
            return datasets.load_dataset(path, config, split=split, **options)
    except ConnectionError:
        raise DataError(
            f"{name}: there is no access to the hub from here ({path}); "
            "use text at hand: a .txt file, python-docs, or self (text the model writes)."
        ) from None
    except FileNotFoundError as error:
        raise DataError(f"{_no_such(name)} The hub says: {_first_line(error)}") from None
    except Exception as error:  # the errors of datasets, pyarrow and the HTTP client share no base of their own
        raise DataError(f"{name}: cannot be loaded: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_retry_messages() -> Iterator[None]:
    """The hub's client warns at each retry; the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
