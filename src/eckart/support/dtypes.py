"""Which dtype a model is stored in and which it computes in."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from eckart.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def named(dtype: str) -> torch.dtype | None:
    """The torch dtype of a name; None for "auto". Raises `OptionError` for an unknown one."""
    if dtype != "auto" and dtype not in NAMES:
        raise OptionError(f"dtype is {dtype!r}, but must be auto, {', '.join(NAMES)}.")
    return NAMES.get(dtype)


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Half precision is computed in float32 on a CPU, where it is many times slower."""
    return torch.float32 if device.type == "cpu" and stored.itemsize < 4 else stored


def compute_in_(model: "PreTrainedModel", dtype: str) -> None:
    """Cast a loaded model to the dtype of a name, or for "auto" to the one it computes in by `compute_dtype`."""
    cast_(model, named(dtype) or compute_dtype(model.dtype, model.device))


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place, tied ones once; buffers stay (a rotary table would lose its digits)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
