"""Experts as targets: each matrix of a stack is one, and while a model is looked at its stacks are open.

An open stack holds a linear layer for each expert, on the memory of the 3-D parameter, and its experts module runs
them one after the other on the tokens that are routed there. So whatever listens to a layer, replaces it or trains it
does the same with an expert, by its name: the stack's, and the number. Closed again, a stack in which nothing was
replaced is the parameter that it was, and one with factors is stacked factors (`eckart.portable.experts`).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import unwrap
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import ModelError
from eckart.portable.experts import (
    DENSE,
    FactorizedExperts,
    put_dense_,
    put_stack_,
    stack_names,
    transposed,
)
from eckart.portable.linear import is_factorized, weight_view
from eckart.types import Target

PRIOR = 0.1  # of the size of a Gram: how many average tokens of its layer an expert is taken to have seen as well
TOLERANCE = 1e-3  # of the largest output: what rounding may change when the products run in another order


@dataclass(frozen=True)
class Routed:
    """The rows that an expert runs on: `tokens` `[rows]` are their numbers in the batch, `gates` `[rows]` weights."""

    tokens: Tensor
    gates: Tensor


class OpenStack(nn.Module):
    """A stack with a linear layer for each expert, named by its number, and what runs through it now.

    `reads_states`: its experts read one space, that of the states; those of the other stack write to it.
    """

    routed: Routed | None = None

    def __init__(self, stack: nn.Parameter, is_transposed: bool, reads_states: bool) -> None:
        super().__init__()
        self._closed = (stack,)  # in a tuple, so that it is no parameter of this module
        self.is_transposed, self.reads_states = is_transposed, reads_states
        for number, matrix in enumerate(matrices(stack, is_transposed)):
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=stack.requires_grad)
            self.add_module(str(number), layer)

    @property
    def layers(self) -> list[Any]:
        """The layers of the experts, dense or factorised."""
        return list(self.children())

    def closed(self) -> nn.Parameter | FactorizedExperts:
        """What takes the place of the open stack: the parameter as it was if no layer was replaced, or a new one."""
        stack, layers = self._closed[0], self.layers
        if any(is_factorized(layer) for layer in layers):
            return _stacked(layers)
        dense = [layer.weight for layer in layers]
        if all(w.data_ptr() == m.data_ptr() for w, m in zip(dense, matrices(stack, self.is_transposed), strict=True)):
            return stack
        whole = torch.stack([w.detach().T if self.is_transposed else w.detach() for w in dense])
        return nn.Parameter(whole, requires_grad=stack.requires_grad)


def matrices(stack: Tensor, is_transposed: bool) -> list[Tensor]:
    """The matrices `[out, in]` of a stack, sharing its memory, detached."""
    return [one.T if is_transposed else one for one in stack.detach()]


@torch.no_grad()
def _stacked(layers: list[Any]) -> FactorizedExperts:
    """The factors of the layers of a stack, plain pairs or dense, as stacked ones."""
    ranks = [layer.rank if is_factorized(layer) else DENSE for layer in layers]
    (of,) = {layer.spec()["storage"] for layer in layers if is_factorized(layer)}
    first, sizes = next(layers[0].parameters()), (layers[0].out_features, layers[0].in_features)
    new = FactorizedExperts(ranks, *sizes, first.device, first.dtype, of=of)
    for rank, members in new.members().items():
        part = new.part(rank)
        if rank == DENSE:
            part.weight.copy_(torch.stack([weight_view(layers[e]) for e in members]))
            continue
        part.basis.copy_(torch.stack([layers[e].basis.weight for e in members]))
        part.coefficients.copy_(torch.stack([layers[e].coefficients.weight for e in members]))
        if of == "pivoted":
            part.index.copy_(torch.stack([layers[e].index for e in members]))
    return new.requires_grad_(first.requires_grad).train(layers[0].training)


def experts_in(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules below `root` whose stacks can be factorised, closed or open, by name."""
    for name, module in root.named_modules():
        names = stack_names(module)
        if names and (any(_open(module, one) for one in names) or transposed(module)):
            yield name, module


def targets_in(path: str, block: nn.Module, index: int) -> dict[str, list[Target]]:
    """The experts of a block as targets, by the kind of their stack; `path` is the list of blocks, `index` the number.

    Raises `ModelError` for a stack that is factorised already.
    """
    found: dict[str, list[Target]] = {}
    for name, module in block.named_modules():
        for leaf in stack_names(module):
            kind = f"{name}.{leaf}"
            if isinstance(getattr(module, leaf), FactorizedExperts):
                raise ModelError(f"{path}.{index}.{kind}: is factorised already; compress the original model instead.")
    for name, module in experts_in(block):
        for leaf in stack_names(module):
            kind = f"{name}.{leaf}"
            count, out_features, in_features = shape_of_stack(module, leaf)
            found[kind] = [
                Target(f"{path}.{index}.{kind}.{e}", index, kind, out_features, in_features, False, e)
                for e in range(count)
            ]
    return found


def shape_of_stack(module: nn.Module, leaf: str) -> tuple[int, int, int]:
    """`(experts, out, in)` of a stack of an experts module, closed or open."""
    if (opened_stack := _open(module, leaf)) is not None:
        layers = opened_stack.layers
        return len(layers), layers[0].out_features, layers[0].in_features
    experts, out_features, in_features = module.get_parameter(leaf).shape
    if transposed(module)[leaf]:
        out_features, in_features = in_features, out_features
    return experts, out_features, in_features


def dense_weight(model: nn.Module, target: Target) -> Tensor:
    """The weight `[out, in]` of a dense target, a view of the model's own, detached; its stack may be closed."""
    if target.expert is not None:
        path, _, leaf = target.name.removesuffix(f".{target.expert}").rpartition(".")
        module = model.get_submodule(path)
        if _open(module, leaf) is None:
            return matrices(module.get_parameter(leaf)[target.expert : target.expert + 1], transposed(module)[leaf])[0]
    return weight_view(model.get_submodule(target.name))


@contextmanager
def opened(model: nn.Module, targets: Iterable[Target]) -> Iterator[None]:
    """The stacks of all experts among the targets open, for as long as the context lasts; those that were are left so.

    Raises `ModelError` for an experts module that computes something else when it is open.
    """
    names = {t.name.removesuffix(f".{t.kind}.{t.expert}"): t.kind for t in targets if t.expert is not None}
    modules = {f"{block}.{kind.rpartition('.')[0]}": None for block, kind in names.items()}
    held = [name for name in modules if not is_open(model.get_submodule(name))]
    proven: set[type] = set()
    try:
        for name in held:
            module = model.get_submodule(name)
            open_(module, name, prove=type(module) not in proven)
            proven.add(type(module))
        yield
    finally:
        for name in held:
            close_(model.get_submodule(name))


def close_all_(model: nn.Module) -> None:
    """Close every open stack of a model."""
    for module in [module for module in model.modules() if is_open(module)]:
        close_(module)


def routed_now(block: nn.Module, target: Target) -> Routed | None:
    """What an expert of a block, whose stack is open, is running on now; None for any other target."""
    if target.expert is None:
        return None
    stack = block.get_submodule(target.kind)
    assert isinstance(stack, OpenStack)
    return stack.routed


def is_open(module: nn.Module) -> bool:
    """Whether an experts module has open stacks."""
    return any(_open(module, name) is not None for name in stack_names(module))


def open_(module: nn.Module, name: str, *, prove: bool) -> None:
    """Open the stacks of an experts module; `prove` compares what it then computes with its own code."""
    expected = _sample(module) if prove else None
    is_transposed, first = transposed(module), stack_names(module)[0]
    for leaf in stack_names(module):
        stack = OpenStack(module.get_parameter(leaf), is_transposed[leaf], reads_states=leaf == first)
        del module._parameters[leaf]
        module.add_module(leaf, stack)
    module.forward = MethodType(_run_one_by_one, module)
    if expected is not None:
        states, index, gates, output = expected
        with torch.no_grad():
            gap = (module(states, index, gates) - output).float().abs().max()
        if not gap <= TOLERANCE * output.float().abs().max().clamp(min=1e-30) and torch.isfinite(output).all():
            close_(module)
            pattern = f"*.{name.rpartition('.')[2]}.*"
            raise ModelError(
                f"{name}: a {type(module).__name__} computes something else than its experts one by one "
                f"(by {gap:.1e}), so they cannot be compressed; leave them out with --exclude {pattern!r}."
            )


def close_(module: nn.Module) -> None:
    """Close the stacks of an experts module, with what its layers are now."""
    for leaf in stack_names(module):
        stack = _open(module, leaf)
        if stack is None:
            continue
        new = stack.closed()
        put_dense_(module, leaf, new) if isinstance(new, nn.Parameter) else _put_factors_(module, leaf, new)


def _put_factors_(module: nn.Module, leaf: str, new: FactorizedExperts) -> None:
    del module._modules[leaf]
    module.register_parameter(leaf, None)
    put_stack_(module, leaf, new)


def _open(module: nn.Module, leaf: str) -> OpenStack | None:
    stack = module._modules.get(leaf)
    return stack if isinstance(stack, OpenStack) else None


@torch.no_grad()
def _sample(module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """A few tokens, where they go, their gates, and what the module's own code makes of them; None without weights."""
    leaf = stack_names(module)[0]
    stack = module.get_parameter(leaf)
    if stack.is_meta:
        return None
    _, _, width = shape_of_stack(module, leaf)
    count = min(4, len(stack))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, width, generator=generator).to(stack)
    index = torch.arange(count, device=stack.device)[:, None]
    gates = torch.linspace(0.5, 1, count).to(stack)[:, None]
    output: Tensor = unwrap(type(module).forward)(module, states, index, gates)
    return states, index, gates, output


def _run_one_by_one(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module computes while it is open, by the interface of experts: one expert after another.

    `hidden_states` is `[tokens, width]`, the others `[tokens, k]`: which experts each token goes to, and the gates.
    """
    reading, writing = (getattr(self, name) for name in stack_names(self))
    result = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        tokens, choice = torch.where(top_k_index == expert)
        gates = top_k_weights[tokens, choice]
        reading.routed = writing.routed = Routed(tokens, gates.detach())
        y = reading.get_submodule(str(expert))(hidden_states[tokens])
        y = _biased(self, stack_names(self)[0], expert, y)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = _biased(self, "down_proj", expert, writing.get_submodule(str(expert))(y))
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        result = result.index_add(0, tokens, (y * gates[:, None]).to(result.dtype))
    return result


def _biased(module: Any, name: str, expert: int, y: Tensor) -> Tensor:
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y
