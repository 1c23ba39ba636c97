"""How methods are found: one folder per extension point, one file per method, one public class per file.

The file name is the method's name; listing names reads the folder and imports nothing. The fields of
the frozen dataclass are the method's options. `module:Class` names a method from outside.
"""

import dataclasses
import difflib
import importlib
import inspect
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from eckart.errors import OptionError
from eckart.support.escaping import plain
from eckart.support.reading import shown

T = TypeVar("T")
KINDS = ("factorizers", "allocators", "refiners")


def names(kind: str) -> list[str]:
    """Names of the methods of a kind, sorted."""
    folder = Path(__file__).parent / kind
    return sorted(f.stem for f in folder.glob("*.py") if f.stem != "base" and not f.stem.startswith("_"))


def get(kind: str, name: str) -> type:
    """The class of a method. Raises `OptionError` with the nearest known name."""
    if ":" in name:
        return _outside(kind, name)
    available = names(kind)
    stem = name.replace("-", "_")
    if stem not in available:
        raise OptionError(unknown(kind.removesuffix("s"), name, available))
    module = importlib.import_module(f"eckart.{kind}.{stem}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
        and dataclasses.is_dataclass(value)
        and _is_method(kind, value)
    ]
    if len(classes) != 1:
        raise OptionError(f"eckart/{kind}/{stem}.py must define exactly one public method class.")
    return classes[0]


def _outside(kind: str, name: str) -> type:
    """The class that `module:Class` names, known to be a method of the kind; it is not made here."""
    module_name, _, class_name = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # a module may raise what it likes when it is imported
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"{plain(repr(name))}: cannot be imported: {plain(reason)}.") from error
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or not _is_method(kind, found):
        one = kind.removesuffix("s")
        raise OptionError(
            f"{plain(repr(name))}: is not a method; name a dataclass that extends "
            f"eckart.{kind}.base.{one.capitalize()}."
        )
    if inspect.isabstract(found):
        lacking = ", ".join(sorted(found.__abstractmethods__))
        raise OptionError(f"{plain(repr(name))}: lacks what a method must define: {lacking}.")
    return found


def _is_method(kind: str, candidate: type) -> bool:
    base = importlib.import_module(f"eckart.{kind}.base")
    contract: type = getattr(base, kind.removesuffix("s").capitalize())
    return issubclass(candidate, contract)


def make(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build a method from its name and options, each option checked against its field's type."""
    return build(get(kind, name), name, options)


def build(method: type[T], name: str, options: Mapping[str, Any] | None = None) -> T:
    """Build a dataclass from options, each checked against its field's type; `name` is for messages."""
    name = plain(name)
    fields = {field.name for field in dataclasses.fields(method) if field.init}  # type: ignore[arg-type]
    checked = {}
    for key, value in (options or {}).items():
        if key not in fields:
            raise OptionError(unknown(f"option of {name}", key, sorted(fields)))
        checked[key] = _coerce(f"{name}.{key}", value, _hints(method, name)[key])
    try:
        return method(**checked)
    except (TypeError, ValueError) as error:  # of a method from outside, whose options may lack a default
        raise OptionError(f"{name}: cannot be made with these options: {plain(error)}.") from error


def _hints(method: type, name: str) -> dict[str, Any]:
    try:
        return get_type_hints(method)
    except Exception as error:  # a name that its module imports for type checkers alone, for example
        raise OptionError(f"{name}: the types of its options cannot be told: {plain(error)}.") from error


def options(kind: str, name: str) -> dict[str, Any]:
    """`{option: default}` of a method."""
    return {field.name: field.default for field in dataclasses.fields(get(kind, name))}


def options_of(method: Any) -> dict[str, Any]:
    """`{option: value}` of a method that was built; tuples as lists, as JSON has them."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def unknown(what: str, name: str, available: list[str]) -> str:
    """The message for an unknown name: the nearest name first, then all that are available."""
    close = difflib.get_close_matches(name[:300], available, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {plain(repr(name))}{hint} Known: {', '.join(available) or 'none'}."


_NOUNS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "none"}


def _coerce(what: str, value: Any, hint: Any) -> Any:
    """Text from a command line to the type of the field; other values are only checked."""
    allowed = (hint,) if get_origin(hint) is tuple else get_args(hint) or (hint,)
    if all(isinstance(choice, str) for choice in allowed):  # a Literal
        if value in allowed:
            return value
        raise OptionError(unknown(f"value of {what}", value if isinstance(value, str) else shown(value), list(allowed)))
    if type(None) in allowed and value in (None, "none"):
        return None
    for kind in allowed:
        if kind is tuple or get_origin(kind) is tuple:
            return _items(what, value, kind)
        fits, converted = _as(kind, value)
        if fits:
            return converted
    raise OptionError(f"{what} is {shown(value)}, but must be {' or '.join(_NOUNS.get(k, str(k)) for k in allowed)}.")


def _items(what: str, value: Any, hint: Any) -> tuple[Any, ...]:
    """The items of a list, or of a text with commas; each to its type for `tuple[T, ...]`."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise OptionError(f"{what} is {shown(value)}, but must be a list.")
    element, *rest = get_args(hint) or (Any,)
    return tuple(_coerce(what, item, element) for item in items) if rest == [...] else tuple(items)


def _as(kind: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value, or what a text says, is of a kind without loss; and the value as that kind."""
    if kind is bool:
        word = value.lower() if isinstance(value, str) else value
        return (True, word in (True, "true")) if word in ("true", "false") or isinstance(word, bool) else (False, None)
    if isinstance(value, bool):  # which Python takes for a whole number
        return False, None
    if kind in (int, float) and isinstance(value, str | Real):
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            return False, None
        exact = isinstance(value, str) or number == value or kind is float
        return exact and math.isfinite(number) and (kind is float or abs(number) < 2**63), number
    return kind is str and isinstance(value, str), value
