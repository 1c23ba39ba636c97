"""Versions of what decides the numbers."""

import platform
from importlib import metadata

import torch

from eckart.version import __version__


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    by_package = {"eckart": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "safetensors", "datasets"):
        try:
            by_package[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return by_package
