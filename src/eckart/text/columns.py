"""Which column of a table is its text. What is not plain from the first rows is asked for, never guessed."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from eckart.errors import DataError
from eckart.text.chat import is_chat
from eckart.text.foreign import named, shown
from eckart.text.rows import Row

# `nothing`: only nulls were seen. `nested`: lists and objects that are no chats. `other`: numbers, truth values, bytes.
Kind = Literal["nothing", "string", "chat", "nested", "other"]

CHATS = ("messages", "conversations")
# Strings under such names are not text, even if they are the only ones.
_LABEL = re.compile(
    r"(.*[_-])?(id|ids|idx|index|uuid|guid|key|hash|md5|sha1|sha256|url|uri|link|path|file|filename|source|origin|"
    r"dataset|subset|split|meta|metadata|tools|functions|schema|domain|lang|language|date|time|timestamp|created|license|category|label|model)",
    re.IGNORECASE,
)
_MISSING = object()


def choose_column(name: str, asked: str, naming: str, head: Sequence[Row]) -> str:
    """The column asked for; else `text`; else the chats; else the only strings, if nothing nested stands beside them.

    `head` are the first rows, by which columns are judged; `naming` is how a column is asked for. Raises `DataError`
    with the columns when none is plain.
    """
    kinds = kinds_of(head)
    has = f"its columns are {', '.join(map(named, _nameable(head))) or 'none'}."
    if asked:
        if kind_of_column(asked, head) not in ("nothing", "string", "chat"):
            raise DataError(f"{name}: has no column {asked!r} of strings or chats; {has}")
        return asked
    if kinds.get("text") == "string":
        return "text"
    chats = [column for column, kind in kinds.items() if kind == "chat"]
    if first := next((column for column in CHATS if column in chats), chats[0] if len(chats) == 1 else ""):
        return first
    if kinds.get("text") == "nothing":
        return "text"
    strings = [column for column, kind in kinds.items() if kind == "string"]
    if len(strings) == 1 and not (hindrance := _hindrance(strings[0], kinds)):
        return strings[0]
    what = f"{len(strings)} columns of strings"
    if chats:
        what = f"{len(chats)} columns of chats ({', '.join(map(named, chats))})"
    elif len(strings) == 1:
        what = f"its only column of strings, {named(strings[0])!r}, {hindrance}"
    raise DataError(f"{name}: has no column 'text' and {what}; choose one by name, {naming}. {_capital(has)}")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _hindrance(column: str, kinds: Mapping[str, Kind]) -> str:
    """Why the only column of strings may not be the text; empty if it may."""
    others = {other: kind for other, kind in kinds.items() if other != column}
    beside = [other for other, kind in others.items() if kind in ("nested", "chat") or other in CHATS]
    if beside:
        return f"stands beside lists or objects ({', '.join(map(named, beside))})"
    return "is named like a label" if _LABEL.fullmatch(column) or column in CHATS else ""


def kinds_of(head: Sequence[Row]) -> dict[str, Kind]:
    """What each column of the rows holds."""
    columns = dict.fromkeys(column for row in head for column in row.values)
    return {column: _kind([row.values.get(column) for row in head]) for column in columns}


def _kind(values: Sequence[Any]) -> Kind:
    """By the first value that says something, but chats and lists show among values that say less."""
    kinds = [kind_of(value) for value in values if value is not None and value != []]
    if not kinds:
        return "nested" if [] in values else "nothing"
    if kinds[0] == "nested" and "chat" in kinds:  # a first row that is damaged
        return "chat"
    return "nested" if kinds[0] == "other" and "nested" in kinds else kinds[0]


def kind_of(value: Any) -> Kind:
    """What one value is."""
    if isinstance(value, str):
        return "string"
    if is_chat(value):
        return "chat"
    return "nested" if isinstance(value, list | dict | tuple) else "other"


def kind_of_column(column: str, head: Sequence[Row]) -> Kind:
    """What a column, or a dotted path into objects, holds."""
    found = [_walk(row, column) for row in head]
    values = [value for value in found if value is not _MISSING]
    return _kind(values) if values else "other"  # a column that no row has


def value_at(row: Row, column: str) -> Any:
    """The value of a column, or along a dotted path into objects; None where the row has none.

    Raises `DataError` where the path leads through what is no object.
    """
    value = _walk(row, column)
    return None if value is _MISSING else value


def _walk(row: Row, column: str) -> Any:
    if column in row.values:
        return row.values[column]
    values: Any = row.values
    for key in column.split("."):
        if values is None:
            return _MISSING
        if not isinstance(values, Mapping):
            raise DataError(f"{row.place}: {named(column)!r} leads through {shown(values)}, which is no object.")
        if key not in values:
            return _MISSING
        values = values[key]
    return values


def _nameable(head: Sequence[Row]) -> list[str]:
    """The columns, those inside objects as dotted paths, in the order in which they are met."""
    names: dict[str, None] = {}
    for row in head:
        for column, value in row.values.items():
            inner = [f"{column}.{key}" for key in value] if isinstance(value, dict) else []
            names.update(dict.fromkeys(inner or [column]))
    return list(names)[:50]


def top_of(column: str, head: Sequence[Row]) -> str:
    """The column of the table that a dotted path begins in."""
    return column if any(column in row.values for row in head) else column.partition(".")[0]
