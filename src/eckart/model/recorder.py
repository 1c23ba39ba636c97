"""What passes through the linear maps of one block during a run."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from eckart.model.experts import Routed, routed_now
from eckart.model.operators import operator
from eckart.types import Target


class Recorder:
    """Records the inputs and outputs of a block's targets; with `own_inputs` each target reads a view of its own.

    `routed[i]` says of use i which tokens an expert ran on, None for a map that every token reaches.
    """

    def __init__(self, block: nn.Module, targets: Sequence[Target], *, own_inputs: bool = False) -> None:
        self.block = block
        self.uses: list[tuple[Target, Tensor, Tensor]] = []
        self.routed: list[Routed | None] = []
        self.handles: list[Any] = []
        for target in targets:
            self.handles += operator(block, target.place).listen(partial(self._record, target), own_input=own_inputs)

    def _record(self, target: Target, x: Tensor, y: Tensor) -> None:
        self.uses.append((target, x, y))
        self.routed.append(routed_now(self.block, target))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def by_input(self, *, gated: bool = True) -> list[tuple[Tensor, list[tuple[Target, Tensor]]]]:
        """The recorded calls, gathered by the identity of their input tensor, then forgotten.

        A target that was called more than once shares its input with no other: not all of its calls would. What
        enters and leaves an expert is `gated`, multiplied by the weight with which its output is added: so that
        squares of it weigh as the model weighs the token's errors.
        """
        calls = Counter(target.name for target, _, _ in self.uses)
        sets: dict[tuple[object, ...], tuple[Tensor, list[tuple[Target, Tensor]]]] = {}
        for (target, x, y), routed in zip(self.uses, self.routed, strict=True):
            apart = target.name if calls[target.name] > 1 else ""
            key = (x.data_ptr(), x.shape, x.stride(), x._version, apart)
            if gated and routed is not None:
                x, y = x * routed.gates[:, None], y * routed.gates[:, None]
            sets.setdefault(key, (x, []))[1].append((target, y))
        self.uses, self.routed = [], []
        return list(sets.values())
