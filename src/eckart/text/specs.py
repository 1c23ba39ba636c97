"""A `--data` spec, parsed: which sources it names. The forms of a spec are listed in `eckart.text.data`."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from eckart.errors import DataError

Purpose = Literal["calibration", "evaluation"]
Kind = Literal["hub", "file", "python-docs", "self"]

KNOWN = ("wikitext2", "ptb", "c4", "python-docs", "self")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet")

_NAME = re.compile(r"\.(?:txt|jsonl|json|parquet)(?=:|$)", re.IGNORECASE)  # where the name of a file may end
_BRACKETS = r"(?![^\[]*\])"  # not inside a slice such as train[:10%]


@dataclass(frozen=True)
class SourceSpec:
    """One source of a spec, as parsed; an empty field means the default. `windows` is its count, if it has one.

    `whole` is the spec that it is a part of.
    """

    kind: Kind
    name: str
    config: str = ""
    split: str = ""
    column: str = ""
    windows: int | None = None
    whole: str = field(default="", compare=False, repr=False)

    @property
    def path(self) -> Path:
        """Where a file or a folder of this name lies; `~` is the home folder."""
        return expand(self.name)


def expand(name: str) -> Path:
    """The path of this name, with `~` for the home folder."""
    return Path(os.path.expanduser(name))


def parse_spec(spec: str) -> list[SourceSpec]:
    """The sources of a spec, in order; a comma or colon in the name of a file that exists belongs to the name.

    Raises `DataError` for an empty spec, too many fields or a count of 0.
    """
    return [replace(_parse_source(text.strip(), spec), whole=spec) for text in _split(spec)]


def _split(spec: str) -> Iterator[str]:
    """The spec cut at its commas, but not within the name of a file that exists."""
    pieces = re.split("," + _BRACKETS, spec)
    start = 0
    while start < len(pieces):
        ends = [end for end in range(len(pieces), start + 1, -1) if _NAME.search(pieces[end - 1])]
        joined = ((end, ",".join(pieces[start:end])) for end in ends)
        end, text = next(((end, text) for end, text in joined if _names_a_file(text)), (start + 1, pieces[start]))
        yield text
        start = end


def _names_a_file(text: str) -> bool:
    """Whether a file is there whose name reaches beyond the last comma."""
    source, _ = _split_count(text.strip())
    return any("," not in column and _is_there(name) for name, column in _file_readings(source))


def _split_count(text: str) -> tuple[str, int | None]:
    counted = re.fullmatch(r"(.*):([0-9]{1,18})", text)
    return (counted[1], int(counted[2])) if counted else (text, None)


def _file_readings(source: str) -> list[tuple[str, str]]:
    """Each way to read a source as the name of a file and a column, the longest name first."""
    ends = [match.end() for match in _NAME.finditer(source)]
    return [(source[:end], source[end + 1 :]) for end in reversed(ends)]


def _is_there(name: str) -> bool:
    try:
        return os.path.lexists(expand(name))
    except ValueError:  # a NUL in the name
        return False


def _parse_source(text: str, spec: str) -> SourceSpec:
    source, windows = _split_count(text)
    if windows == 0:
        raise DataError(f"{text}: asks for 0 windows; a count must be positive.")
    if readings := _file_readings(source):
        name, column = next((one for one in readings if _is_there(one[0])), readings[0])
        if column and name.lower().endswith(".txt"):
            raise DataError(f"{source}: a .txt file has no columns; name it without {':' + column!r}.")
        return SourceSpec("file", name, column=column, windows=windows)
    name, *fields = re.split(":" + _BRACKETS, source)
    if not name:
        raise DataError(f"{spec!r}: a source has no name; write SOURCE or SOURCE:WINDOWS, with commas between.")
    if name == "python-docs" and (not fields or fields in (["first"], ["second"], ["all"])):
        return SourceSpec("python-docs", name, split=fields[0] if fields else "", windows=windows)
    if name == "self" and not fields:
        return SourceSpec("self", name, windows=windows)
    if name in ("python-docs", "self"):
        raise DataError(f"{source}: write python-docs:first, python-docs:second, python-docs:all, or just {name}.")
    if len(fields) > 3:
        raise DataError(f"{source}: has {len(fields) + 1} fields; a corpus of the hub is name:config:split:column.")
    config, split, column = (*fields, "", "", "")[:3]
    return SourceSpec("hub", name, config, split, column, windows)


def label(spec: SourceSpec) -> str:
    """The part as it would be written, without its count."""
    fields = (spec.name, spec.column) if spec.kind == "file" else (spec.name, spec.config, spec.split, spec.column)
    return ":".join(fields).rstrip(":")


def no_such(spec: SourceSpec) -> str:
    """Names the nearest known source or file beside it, then all that is known."""
    close = difflib.get_close_matches(spec.name, [*KNOWN, *_files_beside(spec)], n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    part = f" It is a part of {spec.whole!r}, where commas stand between sources." if "," in spec.whole else ""
    return (
        f"{spec.name}: no such file or corpus{hint}{part} Known: {', '.join(KNOWN)}, a corpus of the hub as "
        f"OWNER/NAME, or a file that ends in {', '.join(ENDINGS)}."
    )


def _files_beside(spec: SourceSpec) -> list[str]:
    try:
        return [str(file) for file in spec.path.parent.iterdir() if file.suffix.lower() in ENDINGS]
    except (OSError, ValueError):
        return []
