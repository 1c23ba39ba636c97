"""Residence: where the weights of the decoder blocks are, and how to get a block when it is to run.

The structure of a model is always in memory, and layers may be swapped in it at any time. The weights of a block are
sure to be at hand only inside `with residence.block(i) as block:`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from eckart.model.discovery import Layout


class Residence(Protocol):
    """The blocks of one model, from the first to the last. A block may be entered again while it is in use."""

    name: str

    @property
    def structure(self) -> nn.ModuleList:
        """The blocks as modules, whose weights need not be at hand."""
        ...

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        ...

    def __len__(self) -> int: ...

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` on its device in the computing dtype, for as long as the context lasts."""
        ...


class InMemory:
    """All blocks of a model that is in memory as a whole."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.name, self.model = layout.blocks, model
        blocks = model.get_submodule(layout.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.structure = blocks

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __len__(self) -> int:
        return len(self.structure)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        yield self.structure[index]


def residence_of(model: nn.Module, layout: Layout) -> Residence:
    """The residence of a model's blocks: the one place that decides where weights live."""
    return InMemory(model, layout)
