"""A table becomes texts: one column of it, strings as they are and chats rendered, a text a row."""

import logging
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from eckart.errors import DataError
from eckart.text import chat
from eckart.text.columns import Kind, choose_column, kind_of, kind_of_column, top_of, value_at
from eckart.text.foreign import shown
from eckart.text.json_rows import parse_json
from eckart.text.rows import Row, Rows

log = logging.getLogger(__name__)

HEAD = 100  # rows by which columns are judged
TOOLS = "tools"  # the column that templates take beside a chat
_HALF = re.compile("[\ud800-\udfff]")  # of a character that JSON wrote as two


@dataclass(frozen=True)
class Table:
    """One column of a table. `rendering` says how a value becomes a text: `text` for a string as it is."""

    name: str
    rows: Rows
    column: str
    rendering: str
    tokenizer: Any

    def texts(self, generator: torch.Generator | None) -> Generator[str, None, None]:
        """The texts in order, or drawn at random, each once; rows without one are passed over.

        Raises `DataError` that names the row for a value of another kind. Half characters become U+FFFD; their count
        is logged.
        """
        mended: list[str] = []
        try:
            for row in self.rows if generator is None else _drawn(self.rows, generator):
                text = self._text(row)
                if text is None:
                    continue
                whole = _HALF.sub("\N{REPLACEMENT CHARACTER}", text)
                if whole != text:
                    mended.append(row.place)
                yield whole
        finally:
            if mended:
                log.warning("%s: half a character stands as U+FFFD (rows with one: %d)", mended[0], len(mended))

    def _text(self, row: Row) -> str | None:
        value = value_at(row, self.column)
        if value is None or value == []:
            return None
        if self.rendering != "text":
            return chat.render(self.tokenizer, value, _tools(row), f"{row.place}: {self.column!r}")
        if not isinstance(value, str):
            raise DataError(f"{row.place}: {self.column!r} is {shown(value)}, but must be a string.")
        return value


def open_table(name: str, rows: Rows, asked: str, naming: str, tokenizer: Any) -> Table:
    """The column of a table that is its text (`choose_column`). Raises `DataError` when none is."""
    head = rows.head(HEAD)
    if not head:
        raise DataError(f"{name}: is empty; give a text.")
    column = choose_column(name, asked, naming, head)
    rows = rows.only(list(dict.fromkeys([top_of(column, head), TOOLS])))
    kind = kind_of_column(column, head)
    kind = _first_kind(rows, column) if kind == "nothing" else kind
    rendering = chat.rendering_of(tokenizer) if kind == "chat" else "text"
    how = "as it is" if rendering == "text" else f"by {rendering}"
    # A choice that nobody made is said aloud: hours of calibration rest on it.
    log.log(
        logging.INFO if asked or column == "text" else logging.WARNING,
        "%s: the text is column %r, %s", name, column, how,
    )  # fmt: skip
    if rendering == chat.BY_ROLES:
        log.warning("%s: the tokenizer has no chat template, so chats become roles and text", name)
    return Table(name, rows, column, rendering, tokenizer)


def _first_kind(rows: Rows, column: str) -> Kind:
    """The kind of the first value that there is, however late."""
    values = (value_at(row, column) for row in rows)
    return next((kind_of(value) for value in values if value is not None and value != []), "nothing")


def _drawn(rows: Rows, generator: torch.Generator) -> Iterator[Row]:
    return (rows[int(index)] for index in torch.randperm(len(rows), generator=generator))


def _tools(row: Row) -> list[dict[str, Any]]:
    """The tools that a row names: a list of objects, or the JSON of one."""
    tools = row.values.get(TOOLS)
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, f"{row.place}: {TOOLS!r}")
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.place}: {TOOLS!r} is {shown(tools)}, but must be a list of objects; mend or rename it.")
    return tools
