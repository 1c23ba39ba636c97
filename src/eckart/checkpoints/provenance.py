"""What would let somebody make the same file again: it travels with every checkpoint and result."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from torch import nn

from eckart.errors import CheckpointError
from eckart.support import reading
from eckart.support.versions import versions


def compress_command(
    source: str | None,
    *,
    recipe: str,
    goal: Mapping[str, Any],
    storage: str | None = None,
    calibration: Any,
    options: Mapping[str, Any],
    include: Sequence[str],
    exclude: Sequence[str],
    device: str,
    dtype: str,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """The `eckart compress` line that does a run again, be it the library or the command line that did it.

    `goal` maps the flags of what was asked to values, `calibration` is a dataclass whose fields are flags, or None
    where no text was read. What has its default is left out, but for the text. A model in memory is
    `MODEL`, the output always `DIR`.
    """
    words = ["eckart", "compress", source or "MODEL", "--recipe", recipe]
    settings = {
        **goal,
        "storage": storage,
        "device": device if device != "cpu" else None,
        "dtype": dtype if dtype != "auto" else None,
        "tokenizer": tokenizer,
    }
    for field in () if calibration is None else fields(calibration):
        value = getattr(calibration, field.name)
        if field.name in ("data", "windows", "length") or value != field.default:
            settings[field.name] = value
    if "join" in settings:
        settings["join"] = settings["join"].replace("\n", "\\n").replace("\t", "\\t")
    for name, value in settings.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    for name, value in options.items():
        words += ["--option", f"{name}={_one_way(value)}"]
    for flag, values in (("--include", include), ("--exclude", exclude)):
        words += [word for value in values for word in (flag, value)]
    words += ["--trust-remote-code"] if trust_remote_code else []
    return shlex.join([*words, "--out", "DIR"])


def _one_way(value: Any) -> str:
    """The same text for 1e-5 and "1e-5", for True and "true", for a list and its commas."""
    text = value if isinstance(value, str) else ",".join(map(str, value)) if isinstance(value, Sequence) else str(value)
    try:
        return str(float(text)) if not text.lstrip("-").isdigit() else text
    except ValueError:
        return text.lower() if isinstance(value, bool) else text


def make_provenance(
    *,
    source: str | None,
    model: nn.Module,
    recipe: dict[str, Any],
    calibration: dict[str, Any] | None,
    ledger: dict[str, Any],
    command: str,
) -> dict[str, Any]:
    """Model and revision, recipe with every option, data with its hash, ledger, versions.

    No times and no paths but the ones the user named: the same run writes the same bytes.
    """
    config = getattr(model, "config", None)
    return {
        "model": {
            "source": source or getattr(config, "_name_or_path", "") or "in memory",
            "revision": getattr(config, "_commit_hash", None),
            "class": type(model).__name__,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(next(model.parameters()).device),
        },
        "command": command,
        "recipe": recipe,
        "calibration": calibration,
        "ledger": ledger,
        "versions": versions(),
    }


class _File(msgspec.Struct):
    bytes: reading.Count
    sha256: str


class _Provenance(msgspec.Struct):
    """What a load acts on; all else in the file is free, and checked by those who show it."""

    files: dict[str, _File] | None = None
    versions: dict[str, Any] = {}


def read(path: Path) -> dict[str, Any]:
    """The provenance in a file. Raises `CheckpointError` when it is damaged."""
    data: dict[str, Any] = reading.read_json(path, CheckpointError)
    reading.checked(data, _Provenance, CheckpointError, path)
    return data
