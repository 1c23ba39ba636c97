"""The hidden states that are carried between blocks, batch by batch; this class alone decides where they are kept."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Store:
    """The states of some batches, each `[batch, seq, width]`, to be read and replaced one at a time.

    In memory, on the device where they were computed. A copy shares the tensors, but a tensor that is replaced in the
    copy stays as it was in the original.
    """

    def __init__(self, states: Iterable[Tensor]) -> None:
        self._states = list(states)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: int) -> Tensor:
        return self._states[index]

    def __setitem__(self, index: int, state: Tensor) -> None:
        self._states[index] = state

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._states)

    def copy(self) -> "Store":
        return Store(self._states)

    def spilled(self, path: Path) -> "Spilled":
        """The states as they are, in a file of their own."""
        save_file({str(index): state.contiguous().cpu() for index, state in enumerate(self._states)}, path)
        return Spilled(path, self._states[0].device)

    def snapshot(self) -> "Store":
        """The states as they are, in one piece of memory of their own.

        For what is kept over many blocks: states that stay one by one on the heap, between what comes and goes, took
        twice their size.
        """
        whole = self._states[0].new_empty(sum(state.numel() for state in self._states))
        parts = torch.split(whole, [state.numel() for state in self._states])
        return Store(part.copy_(s.flatten()).view(s.shape) for part, s in zip(parts, self._states, strict=True))


class Spilled:
    """The states of some batches in a file, from where each is read when it is asked for."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device

    def __getitem__(self, index: int) -> Tensor:
        with safe_open(self.path, "pt") as file:
            state: Tensor = file.get_tensor(str(index))
        return state.to(self.device)

    def drop(self) -> None:
        """Remove the file."""
        self.path.unlink()
