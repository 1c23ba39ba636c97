"""A model's cache of past keys and values, by the name that the model itself uses.

transformers 5.24 calls it `cache`, earlier ones and most models with code of their own `past_key_values`.
"""

import inspect
from typing import Any

NAMES = ("cache", "past_key_values")


def keyword(model: Any) -> str:
    """The name under which the model's forward takes a cache.

    A wrapper that passes all on, as PEFT's, names none: then it is the one that outputs of transformers use.
    """
    named = [name for name in NAMES if name in inspect.signature(model.forward).parameters]
    return named[0] if named else _of_transformers()


def of(output: Any) -> Any:
    """The cache that a forward returned, None if there is none.

    Reads what the output itself holds: transformers 5.24 warns when an output is asked for the old name.
    """
    held = vars(output)
    return next((held[name] for name in NAMES if held.get(name) is not None), None)


def _of_transformers() -> str:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return next(name for name in NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
