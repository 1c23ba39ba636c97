"""What passes through the linear maps of one block during a run."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from eckart.model.operators import operator
from eckart.types import Target


class Recorder:
    """Records the inputs and outputs of a block's targets; with `own_inputs` each target reads a view of its own."""

    def __init__(self, block: nn.Module, targets: Sequence[Target], *, own_inputs: bool = False) -> None:
        self.uses: list[tuple[Target, Tensor, Tensor]] = []
        self.handles: list[Any] = []
        for target in targets:
            self.handles += operator(block, target.kind).listen(partial(self._record, target), own_input=own_inputs)

    def _record(self, target: Target, x: Tensor, y: Tensor) -> None:
        self.uses.append((target, x, y))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def by_input(self) -> list[tuple[Tensor, list[tuple[Target, Tensor]]]]:
        """The recorded calls, gathered by the identity of their input tensor, then forgotten.

        A target that was called more than once shares its input with no other: not all of its calls would.
        """
        calls = Counter(target.name for target, _, _ in self.uses)
        sets: dict[tuple[object, ...], tuple[Tensor, list[tuple[Target, Tensor]]]] = {}
        for target, x, y in self.uses:
            apart = target.name if calls[target.name] > 1 else ""
            key = (x.data_ptr(), x.shape, x.stride(), x._version, apart)
            sets.setdefault(key, (x, []))[1].append((target, y))
        self.uses = []
        return list(sets.values())
