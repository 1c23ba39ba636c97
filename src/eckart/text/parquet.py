"""Rows of a Parquet file, and of any table of Arrow."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

from eckart.errors import DataError
from eckart.text.files import check_regular
from eckart.text.foreign import first_line
from eckart.text.rows import Row, Rows

BATCH = 256  # rows made into Python objects at a time


def rows_of(name: str, table: Any, first: int) -> Iterator[Row]:
    """The rows of an Arrow table or batch, the first of which has the number `first`, from 1."""
    for number, values in enumerate(table.to_pylist(), first):
        yield Row(f"{name} row {number}", {column: _value(value) for column, value in values.items()})


def _value(value: Any) -> Any:
    """A value of a column, such as a chat; its messages keep their own keys, null or not."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items()}
    return [_value(inner) for inner in value] if isinstance(value, list) else value


def _without_nulls(value: Any) -> Any:
    """Arrow puts a null where an object lacks a key that another object has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


class ParquetRows(Rows):
    """In order, no more row groups are read than needed; by number, all of the columns chosen."""

    def __init__(self, path: Path, columns: Sequence[str] | None = None) -> None:
        import pyarrow.parquet  # type: ignore[import-untyped]  # comes with datasets; slow to import

        self.path, self.columns = path, columns
        with self._said():
            check_regular(path)
            self._file = pyarrow.parquet.ParquetFile(path)

    def __iter__(self) -> Iterator[Row]:
        return self._read(BATCH, self.columns)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, index: int) -> Row:
        with self._said():
            return next(rows_of(str(self.path), self._table.slice(index, 1), index + 1))

    def head(self, count: int) -> list[Row]:
        return list(islice(self._read(count, None), count))

    def only(self, columns: Sequence[str]) -> Self:
        return type(self)(self.path, [column for column in columns if column in self._file.schema_arrow.names])

    def _read(self, batch: int, columns: Sequence[str] | None) -> Iterator[Row]:
        number = 1
        with self._said():
            for rows in self._file.iter_batches(batch_size=batch, columns=columns):
                yield from rows_of(str(self.path), rows, number)
                number += len(rows)

    @cached_property
    def _table(self) -> Any:
        return self._file.read(columns=self.columns)

    @contextmanager
    def _said(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # what to_pylist meets is a ValueError
            raise DataError(f"{self.path}: cannot be read as parquet: {first_line(error).rstrip('.')}.") from None
