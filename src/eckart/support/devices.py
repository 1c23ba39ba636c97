"""Whether a device is there, said before anything is read."""

import torch

from eckart.errors import OptionError


def check_device(device: str) -> None:
    """Raise `OptionError` for a device whose name is unknown or that this machine, or this torch, does not have."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise OptionError(f"device is {device!r}, but must be cpu, cuda, cuda:N or mps.") from None
    if kind.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"device is {device!r}, but this machine or this torch has none; use cpu.")
    if kind.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (kind.index or 0) >= count:
            why = "this torch is built without CUDA" if torch.version.cuda is None else f"there are {count} of them"
            raise OptionError(f"device is {device!r}, but {why}; use cpu, or install a torch that knows your card.")
    if kind.type not in ("cpu", "cuda", "mps"):
        raise OptionError(f"device is {device!r}, but must be cpu, cuda, cuda:N or mps.")
