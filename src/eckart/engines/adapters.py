"""LoRA from PEFT on a whole factorised layer, by the name it had: `target_modules=["q_proj"]`.

PEFT knows only torch's own layers. Without this, name the factors, which are `nn.Linear`:
`target_modules=r".*\\.(q_proj|v_proj)\\.(basis|coefficients)"`, or "all-linear".
"""

import warnings
from typing import TYPE_CHECKING, Any

from eckart.errors import OptionError, UserError
from eckart.storages import FactorizedLayer

if TYPE_CHECKING:
    from peft import LoraConfig


def lora(config: "LoraConfig") -> "LoraConfig":
    """Let `config` target factorised layers by name; returns it. Give it again to `PeftModel.from_pretrained`.

    The adapter stands beside the layer, `y = layer(x) + B (A x)`, and is not merged into it: the sum has a
    higher rank than the layer. Raises `OptionError` for variants of LoRA that need the dense weight, and
    `UserError` when PEFT is not installed.
    """
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError:
        raise UserError("LoRA on factorised layers needs PEFT: pip install peft.") from None
    for option in ("use_dora", "init_lora_weights"):
        if (value := getattr(config, option)) not in (False, True, "gaussian"):
            raise OptionError(f"{option} is {value!r}, which needs a dense weight; a factorised layer has none.")
    if config.use_dora:
        raise OptionError("use_dora is True, which needs a dense weight; a factorised layer has none.")

    class FactorizedLora(Linear):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT says that it does not know the layer
                super().__init__(*arguments, **options)

        def merge(self, *_: Any, **__: Any) -> None:
            raise UserError(
                "an adapter on a factorised layer cannot be merged: the sum has a higher rank. "
                "Keep it as an adapter, or call model.dequantize() on the base model before adding it."
            )

    config._register_custom_module({FactorizedLayer: FactorizedLora})
    return config
