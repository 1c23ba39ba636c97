"""How a model arranges its hidden states: `[batch, seq, width]` as a rule, and what to do where it is otherwise.

Some families carry several streams for each token, `[batch, seq, streams, width]` or `[streams, batch, seq, width]`,
others have positions first. Everything that eckart computes on states sees one arrangement: windows, positions, and
all numbers that a token has there side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from eckart.errors import ModelError


@dataclass(frozen=True)
class Form:
    """Which axes of a model's states are windows and positions, and the sizes of the other ones."""

    windows: int = 0
    positions: int = 1
    rest: tuple[int, ...] = (-1,)

    @property
    def is_plain(self) -> bool:
        return (self.windows, self.positions, len(self.rest)) == (0, 1, 1)

    def plain(self, states: Tensor) -> Tensor:
        """`[batch, seq, width]` of states as the model has them."""
        if self.is_plain:
            return states
        return states.movedim((self.windows, self.positions), (0, 1)).flatten(2)

    def native(self, states: Tensor) -> Tensor:
        """The states as the model has them, of `[batch, seq, width]`."""
        if self.is_plain:
            return states
        apart = states.reshape(*states.shape[:2], *self.rest)
        return apart.movedim((0, 1), (self.windows, self.positions)).contiguous()


def form_of(ids: Tensor, states_of: Callable[[Tensor], Tensor | None], name: str) -> Form:
    """The form of a model's states; `states_of(ids)` gives them for token ids `[batch, seq]`, None if no block runs.

    Seen from what changes when there is one window more, and one position less. Raises `ModelError` that names the
    model, `name`, where no such axes are found.
    """
    windows, length = ids.shape
    states = states_of(ids)
    if states is None:
        raise ModelError(f"{name}: runs none of its blocks on token ids alone, so eckart cannot compress this model.")
    if states.dim() == 3 and states.shape[:2] == ids.shape and windows != length:
        return Form()
    other = states_of(ids[:1, : length - 1].expand(windows + 1, -1))
    assert other is not None
    sizes = list(zip(states.shape, other.shape, strict=True))
    at_windows = [axis for axis, pair in enumerate(sizes) if pair == (windows, windows + 1)]
    at_positions = [axis for axis, pair in enumerate(sizes) if pair == (length, length - 1)]
    if len(at_windows) != 1 or len(at_positions) != 1 or states.dim() < 3:
        raise ModelError(
            f"{name}: its hidden states are {list(states.shape)} for token ids {list(ids.shape)}, in which eckart does "
            "not find windows and positions, so it cannot compress this model."
        )
    rest = tuple(size for axis, size in enumerate(states.shape) if axis not in (at_windows[0], at_positions[0]))
    return Form(at_windows[0], at_positions[0], rest)
