"""Results of `eckart bench` as a table, whatever it measured: a row each, a column for each figure."""

from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any]) -> dict[str, Any]:
    """`{"caption", "heads", "rows", "notes"}` with text in every cell."""
    rows = [row for row in result.get("results", []) if isinstance(row, Mapping)]
    plain = list(dict.fromkeys(key for row in rows for key, value in row.items() if _is_plain(value)))
    return {
        "caption": ", ".join(f"{key} {value}" for key, value in result.get("protocol", {}).items() if _is_plain(value)),
        "heads": [key.replace("_", " ") for key in plain],
        "rows": [[_text(row.get(key)) for key in plain] for row in rows],
        "notes": [str(note) for note in result.get("notes", [])],
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
