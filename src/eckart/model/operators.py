"""Operators: a view of one linear map in a model, whatever holds it.

Everything that reads, listens to or replaces a target goes through its operator. So a new kind of linear map, one
that is not a module with a weight of its own, needs a change here only.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eckart.model.walk import replaced
from eckart.portable.linear import is_factorized, is_linear, shape_of, weight_view
from eckart.types import Target

Listener = Callable[[Tensor, Tensor], None]  # sees what enters and what leaves, [..., in] and [..., out]


@dataclass(frozen=True)
class Operator:
    """One linear map `y = W x + b` that is a module: `nn.Linear`, GPT-2's `Conv1D`, or their factorised form."""

    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return shape_of(self.module)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out, in]`, a view of the model's own, detached."""
        return weight_view(self.module)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return bias

    @property
    def is_factorized(self) -> bool:
        return is_factorized(self.module)

    def listen(self, listener: Listener, *, own_input: bool = False) -> list[Any]:
        """Call `listener` at every use; returns handles whose `remove()` ends that.

        With `own_input` the map gets a view of its input that nothing else reads, so that the gradient there is that
        of this map alone, `W^T g`.
        """

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            listener(args[0], output)

        handles: list[Any] = [self.module.register_forward_pre_hook(_view_of_its_own)] if own_input else []
        return [*handles, self.module.register_forward_hook(hook)]

    def dense(self, weight: Tensor) -> nn.Module:
        """A layer with this weight `[out, in]` and the operator's own bias, to stand in its place."""
        out_features, in_features = self.shape
        layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias  # type: ignore[assignment]  # the same object, so that training one trains the other
        return layer.train(self.module.training)


def is_operator(module: nn.Module) -> bool:
    """Whether a module is a linear map, dense or factorised."""
    return is_linear(module) or is_factorized(module)


def operator(root: nn.Module, name: str) -> Operator:
    """The operator of a name below `root`, a model or a block."""
    return Operator(root.get_submodule(name))


def dense_again(
    root: nn.Module, dense: Mapping[str, Tensor], targets: Sequence[Target] | None = None
) -> AbstractContextManager[None]:
    """The dense weights `{target name: [out, in]}` back in their places, for as long as the context lasts.

    In a whole model, or in one block with its `targets`. Biases are the same objects.
    """
    places = (
        {name: name for name in dense} if targets is None else {t.name: t.place for t in targets if t.name in dense}
    )
    return replaced(root, {place: operator(root, place).dense(dense[name]) for name, place in places.items()})


def _view_of_its_own(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].view_as(args[0]), *args[1:])
