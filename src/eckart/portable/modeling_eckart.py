"""What `trust_remote_code=True` runs: the model classes of a checkpoint, for readers without the package.

A checkpoint holds this file beside `hf.py`, what that imports and its storages, byte for byte as they are in the
package. Importing it registers the quantizer. It prefers the installed package, so that one process never has two kinds
of factorised layer. Needs torch and transformers alone.
"""

import sys
from typing import Any

import transformers

try:
    from eckart.portable.hf import METHOD
except ImportError:
    from .hf import METHOD

__all__ = ["METHOD"]


def __getattr__(name: str) -> Any:
    """A subclass of the class of that name in transformers: its configuration or its model.

    It has the same name, so that what is saved with it stays native. A subclass, because transformers
    marks what it loads this way as remote code, and must not mark its own class.
    """
    native: Any = getattr(transformers, name, None)
    is_model = isinstance(native, type) and issubclass(native, transformers.PreTrainedModel)
    if not is_model and not (isinstance(native, type) and issubclass(native, transformers.PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    members: dict[str, Any] = {"__module__": __name__, "__doc__": native.__doc__}
    if is_model:
        members["config_class"] = getattr(sys.modules[__name__], native.config_class.__name__)
        # Or transformers leaves out the renaming of old keys, which it keeps for its own classes.
        members["is_custom_code"] = classmethod(lambda _: False)
        # transformers looks for the fused experts in the source of a class's module, which is this file.
        members["_can_set_experts_implementation_cached_value"] = native._can_set_experts_implementation()
    subclass = type(native)(name, (native,), members)
    globals()[name] = subclass
    return subclass
