"""Rows written as JSON: one a line, or all in one list."""

import json
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from eckart.errors import DataError
from eckart.text import files
from eckart.text.rows import Row, Rows, as_row

_SPACE = re.compile(r"[ \t\r\n]*")
NEAR_THE_END = 16  # characters: an error so near may come of what is not read yet


def open_json(path: Path) -> Rows:
    """The rows of a `.json` or `.jsonl`: a list if it begins with a bracket, else one row a line."""
    if files.first_byte(path) != b"[":
        return JsonLines(path)
    if path.suffix.lower() == ".jsonl":
        raise DataError(
            f"{path}: begins with a list, but a .jsonl holds one object a line, such as "
            '{"text": "..."}; if it is one list of rows, name it .json.'
        )
    return JsonList(path)


def parse_json(text: str, place: str) -> Any:
    """Raises `DataError` with the place for what is not JSON, or beyond what can be read of it."""
    with _said(place):
        return json.loads(text)


@contextmanager
def _said(place: str, layout: str = "") -> Iterator[None]:
    """Turns the errors of the JSON reader into one line; `layout` is added to that of text that is not JSON."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON: {error}.{layout}") from None
    except RecursionError:
        raise DataError(f"{place}: is JSON nested too deeply to be read; take it out.") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        raise DataError(f"{place}: holds a number of too many digits to be read; write it as a string.") from None


class JsonLines(Rows):
    """One object a line; blank lines are passed over. Only a newline ends a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        with files.open_text(self.path) as file:
            offset = file.tell()
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._row(line, number, offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._places[0])

    def __getitem__(self, index: int) -> Row:
        offset, number = (places[index] for places in self._places)
        with files.open_text(self.path) as file:
            file.seek(offset)
            return self._row(file.readline(), number, offset)

    @cached_property
    def _places(self) -> "tuple[array[int], array[int]]":
        """Offset in bytes and number of each line that is not blank."""
        offsets, numbers = array("q"), array("q")
        with files.open_text(self.path) as file:
            offset = file.tell()
            for number, line in enumerate(file, 1):
                if line.strip():
                    offsets.append(offset)
                    numbers.append(number)
                offset += len(line)
        return offsets, numbers

    def _row(self, line: bytes, number: int, offset: int) -> Row:
        place = f"{self.path} line {number}"
        text = files.decode(line, place, offset)
        with _said(place, _layout(number, self.path)):
            value = json.loads(text)
        return as_row(place, value)


def _layout(number: int, path: Path) -> str:
    """What to say beside an error of the first line, which may be that of another layout."""
    if number > 1:
        return ""
    other = "." if path.suffix.lower() == ".json" else ", or name a list of rows .json."
    return f" A row must stand on one line{other}"


class JsonList(Rows):
    """A list of objects, read as far as it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Row]:
        for number, value in enumerate(_elements(files.pieces(self.path), str(self.path)), 1):
            yield as_row(f"{self.path} row {number}", value)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Row:
        return self._all[index]

    @cached_property
    def _all(self) -> list[Row]:
        return [row for row in self]  # list() would ask for the length first


class _Text:
    """A text of which more is read on demand, and what is done with is dropped."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces, self.text, self.at = pieces, "", 0

    def more(self) -> bool:
        """Read at least as much as is held, so that an element is tried again no more often than its size doubles."""
        held, self.at = [self.text[self.at :]], 0
        wanted, size = 2 * len(held[0]), len(held[0])
        for piece in self.pieces:
            held.append(piece)
            size += len(piece)
            if size >= wanted:
                break
        self.text = "".join(held)
        return len(held) > 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            self.at = self.at if space is None else space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def _elements(pieces: Iterator[str], name: str) -> Iterator[Any]:
    """The elements of the JSON list that a text is, one after the other."""
    decoder, text, number = json.JSONDecoder(), _Text(pieces), 0
    text.peek()
    text.at += 1  # the bracket
    if text.peek() == "]":
        return
    while True:
        number += 1
        yield _element(decoder, text, f"{name} row {number}")
        mark = text.peek()
        text.at += 1
        if mark == "]":
            break
        if mark != ",":
            what = f"{mark!r} follows" if mark else "the file ends"
            raise DataError(
                f"{name} row {number}: is not JSON: {what} where a comma or the end of the list must stand."
            )
    if text.peek():
        raise DataError(f"{name}: is not JSON: more stands behind the end of the list, after row {number}.")


def _element(decoder: json.JSONDecoder, text: _Text, place: str) -> Any:
    text.peek()
    while True:
        with _said(place):
            try:
                value, end = decoder.raw_decode(text.text, text.at)
            except json.JSONDecodeError as error:
                cut_short = error.msg.startswith("Unterminated") or error.pos > len(text.text) - NEAR_THE_END
                if cut_short and text.more():
                    continue
                raise DataError(f"{place}: is not JSON: {error.msg}.") from None
        if end == len(text.text) and text.more():
            continue  # a number may go on
        text.at = end
        return value
