"""What would let somebody make the same file again: it travels with every checkpoint and result."""

import platform
from importlib import metadata
from typing import Any

import torch
from torch import nn

from eckart import __version__


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"eckart": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "safetensors", "datasets"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def make_provenance(
    *,
    source: str | None,
    model: nn.Module,
    recipe: dict[str, Any],
    calibration: dict[str, Any] | None,
    ledger: dict[str, Any],
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
        "recipe": recipe,
        "calibration": calibration,
        "ledger": ledger,
        "versions": versions(),
    }
