"""Numbers that are not finite, which a broken model's losses are: exponentials beyond a float, and infinity in JSON.

JSON has no such numbers, and the bare words that Python writes for them no other reader takes. So they
become the texts "Infinity", "-Infinity" and "NaN", which `float` of Python and `Number` of JavaScript read.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

WORDS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def exp(x: float) -> float:
    """`math.exp`, but infinite where that would be an error."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_words(value), indent=indent, allow_nan=False)


def numbers(value: Any) -> Any:
    """What was read from JSON, with the words of `to_json` as numbers again."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def _words(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _words(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_words(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
