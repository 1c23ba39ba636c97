"""Hooks that see what passes through the linear layers of one block."""

from collections.abc import Sequence

import torch
from torch import nn

from eckart.types import Target

Tensor = torch.Tensor


class Recorder:
    """Keeps the inputs and outputs of a block's linear layers during one run.

    With `own_inputs` every layer is handed a view of its input that no other layer reads, so that
    the gradient there is that layer's own, `W^T g`.
    """

    def __init__(self, block: nn.Module, targets: Sequence[Target], *, own_inputs: bool = False) -> None:
        self.seen: list[tuple[Target, Tensor, Tensor]] = []
        modules = [block.get_submodule(target.kind) for target in targets]
        self.handles = [m.register_forward_pre_hook(_view_of_its_own) for m in modules if own_inputs]
        self.handles += [
            module.register_forward_hook(self._hook(target)) for module, target in zip(modules, targets, strict=True)
        ]

    def _hook(self, target: Target):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.append((target, args[0], output))

        return hook

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def by_input(self) -> list[tuple[Tensor, list[tuple[Target, Tensor]]]]:
        """The recorded calls, gathered by the identity of their input tensor, then forgotten."""
        sets: dict[tuple[object, ...], tuple[Tensor, list[tuple[Target, Tensor]]]] = {}
        for target, x, y in self.seen:
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            sets.setdefault(key, (x, []))[1].append((target, y))
        self.seen = []
        return list(sets.values())


def _view_of_its_own(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].view_as(args[0]), *args[1:])
