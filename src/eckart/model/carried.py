"""What blocks hand to one another beside the hidden states: seen at the calls, and carried along with each stream.

Two ways are known. A block returns it, and the next one is given it (the tokens that a sparse attention has chosen,
what a router remembers). Or all blocks hold one mapping, empty at first, that some fill for later ones (keys and
values of one layer that others share). Streams that walk side by side must not see what another has left there.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Carried:
    """What the next block finds, for one batch: what the last one `returned` beside the states (None before the first),
    and what each shared mapping holds.
    """

    returned: tuple[Any, ...] | None = None
    shared: tuple[dict[Any, Any], ...] = ()

    @staticmethod
    def before_the_first(shared: Sequence[MutableMapping[Any, Any]]) -> "Carried":
        return Carried(None, tuple({} for _ in shared))

    def tensors(self) -> list[Tensor]:
        """Those that a gradient can reach, always in the same order."""
        return [x for x in pytree.tree_leaves((self.returned, self.shared)) if _differentiable(x)]

    def reached(self, gradients: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
        """Its tensors that have a gradient, with it; `gradients` are those of `tensors()`, or none at all."""
        if not gradients:
            return []
        pairs = zip(self.tensors(), gradients, strict=True)
        return [(x, gradient) for x, gradient in pairs if gradient is not None and x.requires_grad]

    def apart(self) -> "Carried":
        """The same with tensors of its own that gradients end at."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_() if _differentiable(tensor) else tensor

        returned, shared = pytree.tree_map_only(Tensor, leaf, (self.returned, self.shared))
        return Carried(returned, shared)


def _differentiable(thing: Any) -> bool:
    return isinstance(thing, Tensor) and thing.is_floating_point()


@dataclass(frozen=True)
class Reads:
    """Where a call holds what is carried.

    `places` maps an argument, by its position after the states or its name, to the number of what the last block
    returned beside the states, which are `kept` if any block reads them; `held` to the number of one of the `shared`
    mappings that blocks fill for one another.
    """

    places: dict[int | str, int] = field(default_factory=dict)
    held: dict[int | str, int] = field(default_factory=dict)
    shared: tuple[MutableMapping[Any, Any], ...] = ()
    kept: frozenset[int] = frozenset()

    @staticmethod
    def of(
        args: tuple[Any, ...], kwargs: dict[str, Any], shared: Sequence[MutableMapping[Any, Any]], output: Any
    ) -> "Reads":
        """By identity: `output` is what the stand-in for the block before has returned."""
        beside = output[1:] if isinstance(output, tuple | list) else ()
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]

        def where(things: Sequence[Any]) -> dict[int | str, int]:
            number = {id(thing): i for i, thing in enumerate(things) if isinstance(thing, Tensor | MutableMapping)}
            return {place: number[id(value)] for place, value in arguments if id(value) in number}

        return Reads(where(beside), where(shared), tuple(shared))

    def without(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments with nothing in the places that are filled when the block runs."""
        return _put(args, kwargs, dict.fromkeys((*self.places, *self.held)))

    def filled(self, args: tuple[Any, ...], kwargs: dict[str, Any], carried: Carried) -> Arguments:
        """The arguments with what is carried in its places, mappings included."""
        for mapping, content in zip(self.shared, carried.shared, strict=True):
            mapping.clear()
            mapping.update(content)
        here: dict[int | str, Any] = {place: self.shared[number] for place, number in self.held.items()}
        if carried.returned is not None:
            here |= {place: carried.returned[number] for place, number in self.places.items()}
        return _put(args, kwargs, here)

    def left(self, output: Any) -> Carried:
        """What is carried on after the block has returned `output`."""
        returned = None
        if self.kept:
            returned = tuple(thing if number in self.kept else None for number, thing in enumerate(output[1:]))
        return Carried(returned, tuple(dict(mapping) for mapping in self.shared))


def _put(args: tuple[Any, ...], kwargs: dict[str, Any], things: dict[int | str, Any]) -> Arguments:
    """The arguments with other things in some places."""
    positional = tuple(things.get(place, value) for place, value in enumerate(args))
    return positional, {name: things.get(name, value) for name, value in kwargs.items()}
