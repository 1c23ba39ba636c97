"""Where text comes from: a source of a spec, opened to be read as far as it is needed."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eckart.errors import DataError
from eckart.text import files
from eckart.text.hub import PAPERS, open_hub
from eckart.text.json_rows import open_json
from eckart.text.parquet import ParquetRows
from eckart.text.python_docs import read_python_docs
from eckart.text.rows import Rows
from eckart.text.specs import Purpose, SourceSpec, label, no_such
from eckart.text.tables import open_table

HALVES = {"calibration": "first", "evaluation": "second"}


@dataclass(frozen=True)
class Source:
    """A source of which nothing was read but what tells its layout.

    `texts(generator)` gives its texts one after the other: without a generator in order, else drawn at random.
    `layout` says what a part of them is. "one text": they are lines of one text, of which only the beginning stands
    for the whole. "pieces" of a long text make one text in order, and may be drawn. "rows" are texts of their own.
    """

    name: str
    texts: Callable[[torch.Generator | None], Generator[str, None, None]]
    layout: str
    split: str = "all"
    column: str = ""
    rendering: str = "text"


def check_files(specs: Sequence[SourceSpec]) -> None:
    """Raise `DataError` for a file that is not there or is none, before anything is read or asked of the hub."""
    for spec in specs:
        try:
            if spec.kind == "file":
                files.check_regular(spec.path)
        except FileNotFoundError:
            raise DataError(no_such(spec)) from None
        except OSError as error:
            raise DataError(f"{spec.name}: cannot be read: {error.strerror or error}.") from None


def open_source(spec: SourceSpec, purpose: Purpose, tokenizer: Any, enough: float) -> Source:
    """The source that a spec names; a text file of fewer than `enough` bytes is one text.

    Raises `DataError` that names it when it is unknown or unreadable.
    """
    if spec.kind == "python-docs":
        half = spec.split or HALVES[purpose]
        return Source(spec.name, lambda _: (text for text in read_python_docs(half)), "one text", half)
    if spec.kind == "hub":
        rows, split, column = open_hub(spec, purpose)
        return _of_table(spec, rows, spec.column or column, split, tokenizer)
    path, ending = spec.path, spec.path.suffix.lower()
    if ending == ".parquet":
        return _of_table(spec, ParquetRows(path), spec.column, "all", tokenizer)
    if ending != ".txt":
        return _of_table(spec, open_json(path), spec.column, "all", tokenizer)
    if files.size_of(path) < enough:
        text = files.read_all(path)
        return Source(spec.name, lambda _: (text for text in [text]), "one text")
    return Source(spec.name, lambda g: files.pieces(path) if g is None else files.drawn_pieces(path, g), "pieces")


def _of_table(spec: SourceSpec, rows: Rows, asked: str, split: str, tokenizer: Any) -> Source:
    naming = f"{spec.name}:COLUMN" if spec.kind == "file" else f"{spec.name}:{spec.config}:{spec.split}:COLUMN"
    table = open_table(label(replace(spec, column="")), rows, asked, naming, tokenizer)
    layout = "one text" if spec.name in PAPERS and spec.kind == "hub" else "rows"
    return Source(spec.name, table.texts, layout, split, table.column, table.rendering)
