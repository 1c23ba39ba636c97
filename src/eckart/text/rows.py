"""The rows of a table, wherever it comes from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Self

from eckart.errors import DataError


class Row(NamedTuple):
    """The values of a row by column, and its place as an error names it."""

    place: str
    values: Mapping[str, Any]


class Rows(ABC):
    """Rows that are read when they are asked for: in order, or by number. Raises `DataError` for what is no row."""

    @abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Row: ...

    def head(self, count: int) -> list[Row]:
        """The first rows with every column."""
        return list(islice(self, count))

    def only(self, columns: Sequence[str]) -> Self:
        """The same rows; columns other than these need not be read."""
        return self


def as_row(place: str, value: Any) -> Row:
    """Raises `DataError` unless the value is an object."""
    if not isinstance(value, dict):
        raise DataError(f'{place}: is not an object such as {{"text": "..."}}.')
    return Row(place, value)
