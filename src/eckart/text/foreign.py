"""What stands in files of others, in one short line of characters that can be seen."""

import reprlib
from typing import Any

LONGEST = 200


def shown(value: Any) -> str:
    """A value."""
    return reprlib.repr(value)


def named(column: str) -> str:
    """The name of a column, escaped unless all of it can be seen."""
    return column if column.isprintable() else ascii(column)


def first_line(error: Exception) -> str:
    """What an error of another package says first."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST]
    return line if line.isprintable() else ascii(line)[1:-1]
