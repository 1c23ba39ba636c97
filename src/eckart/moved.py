"""Modules under the names by which others know them.

A saved checkpoint holds `from eckart.hf import METHOD`, the entry point for vLLM is `eckart.serving`, and scripts out
there import what the documentation once named. Each of these names gives the moved module itself, not a copy.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOME = {
    "adapters": "engines.adapters",
    "checkpoint": "checkpoints.checkpoint",
    "data": "text.data",
    "discovery": "model.discovery",
    "hf": "portable.hf",
    "linear": "portable.linear",
    "measure": "evaluation.measure",
    "provenance": "checkpoints.provenance",
    "serving": "engines.serving",
}


class _Forwarder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, leaf = name.partition(".")
        return ModuleSpec(name, self) if package == "eckart" and leaf in HOME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"eckart.{HOME[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already, under its own name, which it keeps."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def forward() -> None:
    """Let the names above be imported from now on."""
    if not any(isinstance(finder, _Forwarder) for finder in sys.meta_path):
        sys.meta_path.append(_Forwarder())
