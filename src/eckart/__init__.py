"""Make Hugging Face language models smaller by low-rank factorisation.

    import eckart

    made = eckart.compress("model-folder", keep=0.8, out="smaller")
    model = eckart.load("smaller")
    print(eckart.evaluate("smaller", against="model-folder"))

Names are loaded when they are first used: importing the package imports neither torch nor transformers
nor datasets. No module is named like a public function, which its import would hide. Once it is imported,
`AutoModelForCausalLM.from_pretrained("smaller")` of transformers loads what eckart saved.
"""

import importlib
from typing import TYPE_CHECKING, Any

from eckart.registration import register_when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eckart.checkpoint import load, save
    from eckart.comparison import compare
    from eckart.compression import Calibration, Compression
    from eckart.conversion import convert
    from eckart.data import load_windows
    from eckart.discovery import Layout, discover
    from eckart.errors import EckartError, NumericalError, UserError
    from eckart.inspection import inspect, methods
    from eckart.ledger import Ledger
    from eckart.linear import FactorizedLinear
    from eckart.measure import evaluate, perplexity
    from eckart.pipeline import compress, plan, spectra
    from eckart.plans import Plan
    from eckart.recipes import Recipe
    from eckart.reporting import report
    from eckart.types import Budget

_HOME = {
    "Budget": "types",
    "Calibration": "compression",
    "Compression": "compression",
    "EckartError": "errors",
    "FactorizedLinear": "linear",
    "Layout": "discovery",
    "Ledger": "ledger",
    "NumericalError": "errors",
    "Plan": "plans",
    "Recipe": "recipes",
    "UserError": "errors",
    "compare": "comparison",
    "compress": "pipeline",
    "convert": "conversion",
    "discover": "discovery",
    "evaluate": "measure",
    "inspect": "inspection",
    "load": "checkpoint",
    "load_windows": "data",
    "methods": "inspection",
    "perplexity": "measure",
    "plan": "pipeline",
    "report": "reporting",
    "save": "checkpoint",
    "spectra": "pipeline",
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
    "compare",
    "compress",
    "convert",
    "discover",
    "evaluate",
    "inspect",
    "load",
    "load_windows",
    "methods",
    "perplexity",
    "plan",
    "report",
    "save",
    "spectra",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    return getattr(importlib.import_module(f"eckart.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_when_imported()
