"""Our quantizer is registered with transformers once both are imported, whichever comes first.

transformers has no entry points to name it in, and importing transformers here would make
`import eckart` slow. So the import of the one module that keeps the registry is watched.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register now if transformers has its registry already, otherwise as soon as it has."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    importlib.import_module("eckart.portable.hf")


class _Watcher(MetaPathFinder):
    """Finds the registry as ever, and registers when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == REGISTRY else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
