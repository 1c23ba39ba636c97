"""Files of text: opened only where that cannot hang, read piece by piece, and UTF-8 or refused with the place."""

import io
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from eckart.errors import DataError

PIECE = 1 << 16  # bytes read at a time
SLACK = 1 << 12  # bytes in which a drawn piece looks for the end of a line

_BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened behind its byte-order mark.

    Raises `DataError` for a folder, a pipe, a device, and for a file that may not be read or has another encoding.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            _skip_mark(file, path)
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def check_regular(path: Path) -> None:
    """Raise `DataError` unless it is a file with an end: to open a pipe may wait for ever.

    Raises `OSError` where there is nothing, or nothing that may be looked at.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # a NUL in the name
        raise FileNotFoundError from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path}: cannot be read: it is a folder; name a file in it.")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: is a pipe or a device, not a file; write its text to a file and name that.")


def _skip_mark(file: BinaryIO, path: Path) -> None:
    head = file.read(4)
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            raise DataError(f"{path}: is {encoding} text by its byte-order mark; save it as UTF-8.")
    file.seek(len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0)


def decode(data: bytes, place: str, offset: int = 0, line: int | None = None) -> str:
    """The text of UTF-8 bytes that stand `offset` bytes into a file, on `line`.

    Raises `DataError` with the first byte that is no text.
    """
    try:
        if (at := data.find(b"\0")) < 0:
            return data.decode()
        what, fix = "holds a NUL", "it may be binary, or UTF-16; save it as UTF-8 without any"
    except UnicodeDecodeError as error:
        at, what, fix = error.start, "is not UTF-8 text", "save it as UTF-8"
    row = "" if line is None else f"line {line + data.count(bytes([10]), 0, at)}, "
    raise DataError(f"{place}: {what} ({row}byte {offset + at}); {fix}.")


def read_all(path: Path) -> str:
    """The whole text of a file."""
    with open_text(path) as file:
        offset = file.tell()
        return decode(file.read(), str(path), offset, 1)


def pieces(path: Path) -> Generator[str, None, None]:
    """The text of a file in pieces of about `PIECE` bytes that end with a line, a word or at least a character."""
    with open_text(path) as file:
        offset, line, held = file.tell(), 1, b""
        while chunk := file.read(PIECE):
            held += chunk
            cut = _last_end(held)
            yield decode(held[:cut], str(path), offset, line)
            offset, line, held = offset + cut, line + held.count(b"\n", 0, cut), held[cut:]
        if held:
            yield decode(held, str(path), offset, line)


def _last_end(data: bytes) -> int:
    """Where the last line, word or character of the bytes ends."""
    start = len(data) - 1
    while start > 0 and _inside(data[start]):
        start -= 1
    return (data.rfind(b"\n") + 1) or (data.rfind(b" ") + 1) or start or len(data)


def _inside(byte: int) -> bool:
    """Whether a byte is within a character of UTF-8 and not its first."""
    return byte & 0xC0 == 0x80


def drawn_pieces(path: Path, generator: torch.Generator) -> Generator[str, None, None]:
    """The pieces of a file in random order, each once; they begin and end with a line where lines are not too long."""
    with open_text(path) as file:
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
        count = max(1, (size - begin) // PIECE)
        for number in torch.randperm(count, generator=generator):
            start = begin + int(number) * PIECE
            file.seek(start)
            data = file.read(PIECE + SLACK) if number < count - 1 else file.read()
            first = _first_end(data, 0) if number > 0 else 0
            last = _first_end(data, PIECE) if number < count - 1 else len(data)
            yield decode(data[first:last], str(path), start + first)


def _first_end(data: bytes, start: int) -> int:
    """Where a line, a word or a character ends, at or soon after `start`."""
    near = data[start : start + SLACK]
    character = next((at for at, byte in enumerate(near) if not _inside(byte)), 0)
    return start + ((near.find(b"\n") + 1) or (near.find(b" ") + 1) or character)


def first_byte(path: Path) -> bytes:
    """The first byte that is no white space; empty for a blank file."""
    with open_text(path) as file:
        while chunk := file.read(PIECE):
            if bare := chunk.lstrip():
                return bare[:1]
    return b""


def size_of(path: Path) -> int:
    """Bytes of a file."""
    with open_text(path) as file:
        return file.seek(0, io.SEEK_END)
