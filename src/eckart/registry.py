"""How methods are found: one folder per extension point, one file per method, one public class per file.

The file name is the method's name; listing names reads the folder and imports nothing. The fields of
the frozen dataclass are the method's options. `module:Class` names a method from outside.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from eckart.errors import OptionError

T = TypeVar("T")
KINDS = ("factorizers", "allocators", "refiners")


def names(kind: str) -> list[str]:
    """Names of the methods of a kind, sorted."""
    folder = Path(__file__).parent / kind
    return sorted(f.stem for f in folder.glob("*.py") if f.stem != "base" and not f.stem.startswith("_"))


def get(kind: str, name: str) -> type:
    """The class of a method. Raises `OptionError` with the nearest known name."""
    if ":" in name:
        module_name, _, class_name = name.partition(":")
        try:
            outside: type = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise OptionError(f"{name!r}: cannot be imported: {error}.") from None
        return outside
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


def _is_method(kind: str, candidate: type) -> bool:
    base = importlib.import_module(f"eckart.{kind}.base")
    contract: type = getattr(base, kind.removesuffix("s").capitalize())
    return issubclass(candidate, contract)


def make(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build a method from its name and options, each option checked against its field's type."""
    return build(get(kind, name), name, options)


def build(method: type[T], name: str, options: Mapping[str, Any] | None = None) -> T:
    """Build a dataclass from options, each checked against its field's type; `name` is for messages."""
    hints = get_type_hints(method)
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    checked = {}
    for key, value in (options or {}).items():
        if key not in fields:
            raise OptionError(unknown(f"option of {name}", key, sorted(fields)))
        checked[key] = _coerce(f"{name}.{key}", value, hints[key])
    return method(**checked)


def options(kind: str, name: str) -> dict[str, Any]:
    """`{option: default}` of a method."""
    return {field.name: field.default for field in dataclasses.fields(get(kind, name))}


def options_of(method: Any) -> dict[str, Any]:
    """`{option: value}` of a method that was built; tuples as lists, as JSON has them."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def unknown(what: str, name: str, available: list[str]) -> str:
    """The message for an unknown name: the nearest name first, then all that are available."""
    close = difflib.get_close_matches(name, available, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(available) or 'none'}."


def _coerce(what: str, value: Any, hint: Any) -> Any:
    """Text from a command line to the type of the field; other values are only checked."""
    if get_origin(hint) is tuple:
        return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    allowed = get_args(hint) or (hint,)
    if all(isinstance(choice, str) for choice in allowed):  # a Literal
        if value in allowed:
            return value
        raise OptionError(unknown(f"value of {what}", str(value), list(allowed)))
    if type(None) in allowed and value in (None, "none"):
        return None
    for kind in allowed:
        try:
            if kind is bool and str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
            if kind in (int, float) and not isinstance(value, bool):
                return kind(value)
            if kind in (str, tuple):
                return tuple(value.split(",")) if kind is tuple and isinstance(value, str) else kind(value)
        except (TypeError, ValueError):
            continue
    raise OptionError(
        f"{what} is {value!r}, but must be {' or '.join(getattr(k, '__name__', str(k)) for k in allowed)}."
    )
