"""Which dtype a model is stored in and which it computes in."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
    for module in model.modules():
        if hasattr(module, "model_dtype"):  # of a matrix in few bits, which has no parameters
            module.model_dtype = dtype  # type: ignore[assignment]


def round_(model: nn.Module, dtype: torch.dtype) -> bool:
    """Round the parameters in place to what `dtype` can hold, in the dtype that they have; True if that is narrower.

    So that what is measured is the model as it will be stored. Raises `OptionError` that names the first parameter
    whose values lie beyond the range of `dtype`.
    """
    rounded = False
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            parameter.data.copy_(_narrow(name, parameter.data, dtype))
            rounded = True
    return rounded


def check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise `OptionError` for values beyond the range of the dtype that they are to be stored in."""
    if tensor.dtype != dtype:
        _narrow(name, tensor.detach(), dtype)


def _narrow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow).all():
        raise OptionError(
            f"{name}: holds values up to {float(tensor.abs().max()):.4g}, but {str(dtype).removeprefix('torch.')} ends "
            f"at {torch.finfo(dtype).max:.6g}; store in bfloat16, or float32 (--dtype)."
        )
    return narrow
