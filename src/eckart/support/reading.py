"""The one door for files that are parsed, which may be anybody's: checked values come out, or one line of error.

A file is read as plain data (`read_json`, `read_toml`), and the data are held against a type (`checked`): a
`msgspec.Struct` that stands beside the code which uses them. Everything that can be wrong with either is raised as the
caller's kind of `UserError`, naming the file, the place in it, the value and the rule.
"""

import json
import re
import reprlib
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from eckart.errors import UserError
from eckart.support.escaping import plain
from eckart.support.not_finite import numbers

T = TypeVar("T")
LARGEST = 1_000_000_000  # bytes; the largest of our own files have some megabytes
DEEPEST = 100  # levels of nesting; what walks over the data later may then recurse

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what a float still holds exactly
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]

_NOUNS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}


def read_json(path: Path, kind: type[UserError], what: str = "file") -> Any:
    """The plain data of a JSON file, UTF-8 with or without a byte-order mark.

    The words of `not_finite.to_json` become numbers again. `what` names the file in "no such ...". Raises `kind`.
    """
    return numbers(_parsed(path, kind, what, "JSON", json.loads))


def read_toml(path: Path, kind: type[UserError], what: str = "file") -> dict[str, Any]:
    """The plain data of a TOML file. Raises `kind`, as `read_json` does."""
    data: dict[str, Any] = _parsed(path, kind, what, "TOML", tomllib.loads)
    return data


def checked(data: Any, shape: type[T], kind: type[UserError], source: object, an_object: str = "an object") -> T:
    """Plain data as `shape`, a `msgspec.Struct` or another type; nothing is converted but lists, mappings and numbers.

    Raises `kind` for what does not fit: `source: entries[3].rank is 'x', but it must be a whole number.`
    """
    try:
        return msgspec.convert(data, shape)
    except msgspec.ValidationError as error:
        said = _said(str(error), data).replace("an object", an_object)
        raise kind(f"{plain(source, 1000)}: {said}.") from None
    except UnicodeEncodeError:  # JSON can say it by an escape, but it is no text, and UTF-8 has no bytes for it
        raise kind(f"{plain(source, 1000)}: holds half of a surrogate pair among its keys.") from None


def shown(value: object) -> str:
    """A value in a message: its `repr`, shortened, on one line."""
    try:
        return plain(_SHORT.repr(value), 120)
    except ValueError:  # a whole number that Python does not write
        return "a number of too many digits"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def _parsed(path: Path, kind: type[UserError], what: str, language: str, parse: Callable[[str], Any]) -> Any:
    text = _text(path, kind, what)
    try:
        data = parse(text)
        _check_depth(data)
    except RecursionError:
        reason = f"it is nested more than {DEEPEST} levels deep"
    except ValueError as error:
        digits = "integer string conversion" in str(error)
        reason = "it holds a number of more than 4,300 digits" if digits else str(error)
    else:
        return data
    raise kind(f"{plain(path, 1000)}: cannot be read as {language}: {plain(reason)}.")


def _text(path: Path, kind: type[UserError], what: str) -> str:
    name = plain(path, 1000)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise kind(f"{name}: is a folder; name a file.")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for whoever writes into it
            raise kind(f"{name}: is a pipe or a device; name a file.")
        if status.st_size > LARGEST:
            raise kind(f"{name}: has {status.st_size:,} bytes, but nothing that is read here has {LARGEST:,}.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{name}: cannot be read: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that no file can have
        raise kind(f"{name}: no such {plain(what, 1000)}.") from None
    except OSError as error:
        raise kind(f"{name}: cannot be read: {error.strerror or plain(error)}.") from None


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST + 1):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
    raise RecursionError


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _said(message: str, data: Any) -> str:
    """What msgspec says of data that do not fit, in the words of our other messages."""
    placed = re.fullmatch(r"(.*) - at `(?:key` in `)?\$(.*)`", message, re.DOTALL)
    text, where = (placed[1], placed[2].lstrip(".")) if placed else (message, "")
    if wanted := re.fullmatch(r"Expected `([^`]+)`, got `([^`]+)`", text):
        if not where:
            return "must hold a JSON object"
        nouns = " or ".join(_NOUNS.get(name, name) for name in wanted[1].split(" | "))
        return f"{_subject(where, data, _NOUNS.get(wanted[2], wanted[2]))}, but it must be {nouns}"
    if bound := re.fullmatch(r"Expected `\w+` (of length )?(>=|<=|>|<) (\S+)", text):
        rule = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}[bound[2]]
        count = "its length must be" if bound[1] else "it must be"
        return f"{_subject(where, data)}, but {count} {rule} {bound[3]}"
    if length := re.fullmatch(r"Expected `array` of length (\d+), got (\d+)", text):
        return f"{where} has {length[2]} items, but it must have {length[1]}"
    if lacking := re.fullmatch(r"Object missing required field `(.+)`", text, re.DOTALL):
        return f"{where + ' ' if where else ''}has no {lacking[1]!r}"
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", text, re.DOTALL):
        return f"{where + ': ' if where else ''}unknown key {shown(unknown[1])}"
    if text.startswith("Invalid enum value"):
        return f"{_subject(where, data)}, which is none of its values"
    if text == "Number out of range":
        return f"{_subject(where, data)}, which is too large a number"
    return f"{where + ': ' if where else ''}{plain(text, 1000)}"


def _subject(where: str, data: Any, otherwise: str = "another value") -> str:
    """`entries[3].rank is 'x'`; within a mapping, whose key msgspec does not tell, what kind of value it is."""
    if "[...]" in where:
        return f"{where} is {otherwise}"
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", where):
        data = data[name] if name else data[int(index)]
    return f"{where} is {shown(data)}"
