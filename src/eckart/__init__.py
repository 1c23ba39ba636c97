"""Make Hugging Face language models smaller by low-rank factorisation.

    import eckart

    compression = eckart.compress("model-folder", keep=0.8, out="smaller")
    print(compression.ledger)
    model = eckart.load("smaller")
    print(eckart.evaluate("smaller", against="model-folder"))

Names are loaded when they are first used: importing the package imports neither torch nor transformers
nor datasets. No module is named like a public function, which its import would hide. Once it is imported,
`AutoModelForCausalLM.from_pretrained("smaller")` of transformers loads what eckart saved.
"""

import importlib
from typing import TYPE_CHECKING, Any

from eckart.moved import HOME, forward
from eckart.portable.registration import register_when_imported
from eckart.version import __version__

if TYPE_CHECKING:
    from eckart.checkpoints.checkpoint import load, save
    from eckart.checkpoints.conversion import convert
    from eckart.checkpoints.verification import verify
    from eckart.engines.exporting import export
    from eckart.errors import EckartError, NumericalError, UserError
    from eckart.evaluation.measure import evaluate
    from eckart.inspection import inspect, methods
    from eckart.ledger import Ledger
    from eckart.measuring.perplexity import perplexity
    from eckart.model.discovery import Layout, discover
    from eckart.pages.comparison import compare
    from eckart.pages.reporting import report
    from eckart.pipeline import compress, plan, spectra
    from eckart.plans.plan import Plan
    from eckart.portable.hf import own_bases_
    from eckart.recipes import Recipe
    from eckart.run import Compression
    from eckart.storages.pair import FactorizedLinear
    from eckart.text.calibration import Calibration
    from eckart.text.data import load_windows
    from eckart.timing.speed import bench
    from eckart.types import Budget

_HOME = {
    "Budget": "types",
    "Calibration": "text.calibration",
    "Compression": "run",
    "EckartError": "errors",
    "FactorizedLinear": "storages.pair",
    "Layout": "model.discovery",
    "Ledger": "ledger",
    "NumericalError": "errors",
    "Plan": "plans.plan",
    "Recipe": "recipes",
    "UserError": "errors",
    "bench": "timing.speed",
    "compare": "pages.comparison",
    "compress": "pipeline",
    "convert": "checkpoints.conversion",
    "discover": "model.discovery",
    "evaluate": "evaluation.measure",
    "export": "engines.exporting",
    "inspect": "inspection",
    "load": "checkpoints.checkpoint",
    "load_windows": "text.data",
    "methods": "inspection",
    "own_bases_": "portable.hf",
    "perplexity": "measuring.perplexity",
    "plan": "pipeline",
    "report": "pages.reporting",
    "save": "checkpoints.checkpoint",
    "spectra": "pipeline",
    "verify": "checkpoints.verification",
}

__all__ = [
    "Budget",
    "Calibration",
    "Compression",
    "EckartError",
    "FactorizedLinear",
    "Layout",
    "Ledger",
    "NumericalError",
    "Plan",
    "Recipe",
    "UserError",
    "__version__",
    "bench",
    "compare",
    "compress",
    "convert",
    "discover",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_windows",
    "methods",
    "own_bases_",
    "perplexity",
    "plan",
    "report",
    "save",
    "spectra",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in HOME:  # `from eckart import checkpoint`
        return importlib.import_module(f"eckart.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    return getattr(importlib.import_module(f"eckart.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_when_imported()
forward()
