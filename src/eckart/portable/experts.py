"""The experts of a mixture-of-experts layer, which transformers keeps in stacks: dense, and as stacked factors.

A stack is a 3-D parameter of an experts module, `[experts, out, in]` or, transposed, `[experts, in, out]`. One that
follows transformers' experts interface (`use_experts_implementation`) has two: what reads the states (`gate_up_proj`,
or `up_proj` without a gate) and `down_proj`, which writes back. Checkpoints are read through this file too, so it
travels with them: torch alone.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STORAGE = "experts"  # of a stack's entry in a checkpoint's configuration
DENSE = 0  # among ranks: this expert is not factorised
ALIGNED = 16  # bytes: grouped products want the rows of their matrices so

_PROBED: dict[type, dict[str, bool]] = {}


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the stacks of an experts module, what reads the states first; none for any other module."""
    marks = ("has_gate", "has_bias", "has_post_expert_norm", "num_experts", "_apply_gate")
    if not all(hasattr(module, mark) for mark in marks):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    stacks = [getattr(module, name, None) for name in names]
    if not all(isinstance(stack, nn.Module) or (isinstance(stack, Tensor) and stack.dim() == 3) for stack in stacks):
        return ()
    return names


def transposed(module: nn.Module) -> dict[str, bool]:
    """Which of an experts module's stacks are `[experts, in, out]`, by name; empty if its code uses them otherwise.

    Found by running the module's own code on one token and looking at the products, once for each class.
    """
    if type(module) not in _PROBED:
        stacks = {name: getattr(module, name) for name in stack_names(module)}
        if not stacks or not all(isinstance(stack, Tensor) for stack in stacks.values()):
            return {}
        found = _probe(module, stacks)
        if not found and any(stack.is_meta for stack in stacks.values()):
            return {}  # its code may need numbers
        _PROBED[type(module)] = found
    return dict(_PROBED[type(module)])


def _probe(module: nn.Module, stacks: Mapping[str, Tensor]) -> dict[str, bool]:
    reading = next(iter(stacks.values()))
    forward = inspect.unwrap(type(module).forward)
    index = torch.zeros(1, 1, dtype=torch.long, device="cpu" if reading.is_meta else reading.device)
    for width in dict.fromkeys(reading.shape[1:]):
        states = torch.zeros(1, width, dtype=reading.dtype, device=reading.device)
        with torch.no_grad(), _Products(stacks) as seen, suppress(Exception):  # a foreign code's on meta tensors
            forward(module, states, index, torch.ones(1, 1, dtype=reading.dtype, device=reading.device))
        if seen.is_plain:
            return {name: uses == {True} for name, uses in seen.uses.items()}
    return {}


class _Products(TorchFunctionMode):
    """Sees from which side slices of stacks enter products: `uses[name]` holds True for `x @ slice`."""

    def __init__(self, stacks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.stacks = {id(stack): name for name, stack in stacks.items()}
        self.uses: dict[str, set[bool]] = {name: set() for name in stacks}
        self.slices: dict[int, tuple[str, Tensor]] = {}
        self.strange = False

    @property
    def is_plain(self) -> bool:
        return not self.strange and all(len(uses) == 1 for uses in self.uses.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and id(args[0]) in self.stacks and isinstance(result, Tensor):
            self.slices[id(result)] = (self.stacks[id(args[0])], result)  # kept, so that no other has its number
            return result
        second = self.slices.get(id(args[1])) if len(args) > 1 else None
        if second is not None and func is nn.functional.linear:
            self.uses[second[0]].add(False)
        elif second is not None and func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            self.uses[second[0]].add(True)
        elif any(id(one) in self.slices for one in args) and not _is_getter(func):
            self.strange = True
        return result


def _is_getter(func: Any) -> bool:
    """Attributes such as a shape or a dtype, which are read by functions too."""
    return getattr(func, "__name__", "") == "__get__"


class PairStack(nn.Module):
    """Some matrices of one shape and rank: `basis` `[count, rank, in]`, `coefficients` `[count, out, rank]`."""

    def __init__(self, count: int, out_features: int, in_features: int, rank: int, **placed: Any) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.empty(count, rank, in_features, **placed))
        self.coefficients = nn.Parameter(torch.empty(count, out_features, rank, **placed))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """`[rows, in]` to `[rows, out]`; the first `counts[0]` rows are for matrix 0, and so on."""
        return grouped(grouped(x, self.basis, counts), self.coefficients, counts)

    @property
    def weight(self) -> Tensor:
        return self.coefficients @ self.basis


class PivotedStack(nn.Module):
    """Some matrices of one shape and rank with pivots (storage `pivoted`), on the side that is the smaller one.

    Of rows: `basis` `[count, rank, in]`, `coefficients` `[count, out - rank, rank]`, and `index` `[count, out]` says
    where each output is among what they give. Of columns: `basis` `[count, rank, in - rank]`, `coefficients`
    `[count, out, rank]`, and `index` `[count, in]` is the order in which inputs enter.
    """

    index: Tensor

    def __init__(self, count: int, out_features: int, in_features: int, rank: int, **placed: Any) -> None:
        super().__init__()
        self.rank, self.rows = rank, pivots_rows(out_features, in_features)
        rest_in, rest_out = (0, rank) if self.rows else (rank, 0)
        self.basis = nn.Parameter(torch.empty(count, rank, in_features - rest_in, **placed))
        self.coefficients = nn.Parameter(torch.empty(count, out_features - rest_out, rank, **placed))
        permuted = out_features if self.rows else in_features
        index = torch.arange(permuted, dtype=torch.int32, device=placed.get("device"))
        self.register_buffer("index", index.repeat(count, 1))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """As `PairStack.forward`."""
        order = self.index.long()[matrix_of_row(counts, len(x))]
        if self.rows:
            p = grouped(x, self.basis, counts)
            return torch.cat([p, grouped(p, self.coefficients, counts)], -1).gather(1, order)
        x = x.gather(1, order)
        first, rest = x[:, : self.rank].contiguous(), x[:, self.rank :].contiguous()
        return grouped(first + grouped(rest, self.basis, counts), self.coefficients, counts)

    @property
    def weight(self) -> Tensor:
        rest, order = self.coefficients @ self.basis, self.index.long()
        if self.rows:
            return torch.cat([self.basis, rest], 1).gather(1, order[:, :, None].expand(-1, -1, rest.shape[2]))
        back = order.argsort(1)
        return torch.cat([self.coefficients, rest], 2).gather(2, back[:, None].expand(-1, rest.shape[1], -1))


def pivots_rows(out_features: int, in_features: int) -> bool:
    """Whether a pivoted stack permutes outputs: the smaller side, as `eckart.maths.pivot` chooses it."""
    return out_features <= in_features


class DenseStack(nn.Module):
    """Some matrices of one shape as they were: `weight` `[count, out, in]`."""

    def __init__(self, count: int, out_features: int, in_features: int, **placed: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_features, in_features, **placed))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """As `PairStack.forward`."""
        return grouped(x, self.weight, counts)


class FactorizedExperts(nn.Module):
    """What stands in the place of a stack: its matrices by their ranks, those of one rank as one stack of pairs.

    `ranks[e]` is the rank of expert e, 0 for one that is dense. Part `rank_<r>` holds the experts of rank r in their
    order, part `dense` the dense ones. An expert costs what it would by itself in the storage `of`, and no padding.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        out_features: int,
        in_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        of: str = "pair",
    ) -> None:
        super().__init__()
        self.ranks, self.out_features, self.in_features, self.of = tuple(ranks), out_features, in_features, of
        placed = {"device": device, "dtype": dtype}
        for rank, members in self.members().items():
            if rank == DENSE:
                self.dense = DenseStack(len(members), out_features, in_features, **placed)
            else:
                self.add_module(part_name(rank), STACKS[of](len(members), out_features, in_features, rank, **placed))

    def members(self) -> dict[int, list[int]]:
        """The numbers of the experts of each rank."""
        return {rank: [e for e, other in enumerate(self.ranks) if other == rank] for rank in sorted(set(self.ranks))}

    def part(self, rank: int) -> Any:
        """The stack of the experts of a rank."""
        return self.get_submodule(part_name(rank))

    def forward(self, x: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
        """`[rows, in]`, sorted by expert, to `[rows, out]`: row i goes to `experts[i]`, and `counts[e]` rows to e.

        One pair of grouped products for each rank that occurs, and no loop over experts.
        """
        parts = self.members()
        if len(parts) == 1:
            y: Tensor = self.part(self.ranks[0])(x, counts)
            return y
        result = x.new_empty(len(x), self.out_features)
        ranks = torch.tensor(self.ranks, device=x.device)[experts]
        for rank, members in parts.items():
            rows = (ranks == rank).nonzero()[:, 0]
            result = result.index_copy(0, rows, self.part(rank)(x[rows], counts[members]))
        return result

    @property
    def weight(self) -> Tensor:
        """The products `[experts, out, in]`, computed."""
        parts = {rank: self.part(rank).weight for rank in self.members()}
        rows = {e: parts[rank][i] for rank, members in self.members().items() for i, e in enumerate(members)}
        return torch.stack([rows[e] for e in range(len(self.ranks))])

    def spec(self) -> dict[str, Any]:
        """This stack's entry in a checkpoint's configuration."""
        return {"storage": STORAGE, "of": self.of, "ranks": list(self.ranks)}

    def extra_repr(self) -> str:
        counted = ", ".join(f"{len(members)} of rank {rank or 'full'}" for rank, members in self.members().items())
        return f"in_features={self.in_features}, out_features={self.out_features}, experts: {counted}"


STACKS: dict[str, Any] = {"pair": PairStack, "pivoted": PivotedStack}  # by the storage of what is stacked


def part_name(rank: int) -> str:
    """The name of the part of a stack that holds the experts of a rank."""
    return "dense" if rank == DENSE else f"rank_{rank}"


def ranks_in(spec: Mapping[str, Any], experts: int, most: int) -> tuple[int, ...]:
    """The ranks of a stack's entry. Raises `ValueError` unless each expert has one in `[0, most]`, not all 0."""
    ranks: Any = spec.get("ranks")
    usual = isinstance(ranks, list) and all(type(rank) is int and 0 <= rank <= most for rank in ranks)
    if not usual or len(ranks) != experts or not any(ranks):
        raise ValueError(
            f"ranks is {ranks!r:.100}, but it must be {experts} whole numbers in [0, {most}], one for each expert, "
            "0 for one that is dense."
        )
    return tuple(ranks)


def check_stack(stack: FactorizedExperts) -> None:
    """Raise `ValueError` when an index of a pivoted stack does not hold each number of its range once."""
    for rank in sorted(set(stack.ranks) - {DENSE}) if stack.of == "pivoted" else ():
        index = stack.part(rank).index
        order = torch.arange(index.shape[1], device=index.device)
        if not index.is_meta and not torch.equal(index.long().sort(1).values, order.expand_as(index)):
            raise ValueError(f"{part_name(rank)}.index must hold every number below {len(order)} once; it is damaged.")


def grouped(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Products of sorted rows with their matrices: `[rows, in]` with `[n, out, in]` to `[rows, out]`.

    The first `counts[0]` rows are multiplied by matrix 0, the next `counts[1]` by matrix 1, and so on. By torch's
    grouped product where it can, else by batched ones: on matrices taken for each row where rows are fewer than
    matrices, on padded rows otherwise.
    """
    if _can_group(x, weights):
        offsets = counts.cumsum(0).to(torch.int32)
        product: Tensor = nn.functional.grouped_mm(x.to(weights.dtype), weights.transpose(-2, -1), offs=offsets)
        return product
    of_row = matrix_of_row(counts, len(x))
    if len(x) <= len(weights):
        return torch.bmm(weights[of_row], x[:, :, None])[:, :, 0]
    place = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[of_row]
    padded = x.new_zeros(len(weights), int(counts.max()), x.shape[1])
    padded = padded.index_put((of_row, place), x)
    return torch.bmm(padded, weights.transpose(-2, -1))[of_row, place]


def matrix_of_row(counts: Tensor, rows: int) -> Tensor:
    """The number of the matrix of each sorted row, `[rows]`."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=rows)


def _can_group(x: Tensor, weights: Tensor) -> bool:
    """Whether torch's grouped product takes these: its rows are aligned, and double precision it does not know."""
    if not hasattr(nn.functional, "grouped_mm") or not len(x) or weights.dtype not in (torch.bfloat16, torch.float32):
        return False
    if weights.device.type == "cuda" and torch.cuda.get_device_capability(weights.device) < (8, 0):
        return False
    aligned = all(size * weights.itemsize % ALIGNED == 0 for size in weights.shape[1:])
    if torch.compiler.is_compiling():  # which knows no addresses, and groups in bfloat16 alone
        return aligned and weights.dtype == torch.bfloat16
    return aligned and all(tensor.data_ptr() % ALIGNED == 0 and tensor.is_contiguous() for tensor in (x, weights))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module with a factorised stack computes, by transformers' interface of experts.

    `hidden_states` is `[tokens, width]`, the others `[tokens, k]`: which experts each token goes to, and the gates.
    Rows are sorted by expert and go through both stacks at once. Raises `ValueError` for experts spread over devices.
    """
    if getattr(self, "_is_expert_parallel", False):
        raise ValueError("factorised experts cannot be spread over devices; load without a parallel plan.")
    tokens, choices = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1).long(), stable=True)
    counts = experts.new_zeros(self.num_experts).scatter_add(0, experts, torch.ones_like(experts))
    reading, writing = stack_names(self)
    y = _through(self, reading, hidden_states[order // choices], experts, counts)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _through(self, writing, y, experts, counts)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order][:, None]
    y = y[torch.argsort(order)].view(tokens, choices, -1).sum(1)  # in the order of the tokens: no race of additions
    return y.to(hidden_states.dtype)


def _through(module: Any, name: str, x: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
    """One stack, factorised or dense, on sorted rows, with its bias."""
    stack = getattr(module, name)
    if isinstance(stack, FactorizedExperts):
        y: Tensor = stack(x, experts, counts)
    else:
        y = grouped(x, stack.transpose(-2, -1) if module.is_transposed else stack, counts)
    return y + getattr(module, f"{name}_bias")[experts] if module.has_bias else y


def put_stack_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put what stands for the stack `name` in its place, and let its experts module compute with it."""
    module, leaf = owner_of(model, name)
    del module._parameters[leaf]
    module.add_module(leaf, new)
    module.forward = partial(experts_forward, module)  # a method could not be pickled


def put_dense_(model: nn.Module, name: str, stack: nn.Parameter) -> None:
    """Put a 3-D parameter back in the place of what stood for the stack `name`."""
    module, leaf = owner_of(model, name)
    del module._modules[leaf]
    module.register_parameter(leaf, stack)
    if not any(isinstance(getattr(module, other), nn.Module) for other in stack_names(module)):
        module.__dict__.pop("forward", None)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The experts module that holds the stack `name` of a model, and the stack's own name."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def is_dense_stack(model: nn.Module, name: str) -> bool:
    """True if `name` is a stack of a model whose matrices can be factorised, and which are not yet."""
    try:
        module, leaf = owner_of(model, name)
    except AttributeError:
        return False
    return leaf in module._parameters and leaf in stack_names(module) and leaf in transposed(module)


def empty_stack(model: nn.Module, name: str, spec: Mapping[str, Any]) -> FactorizedExperts:
    """The factorised form of the dense stack `name` by its entry, on the same device and dtype, weights not yet set.

    Raises `ValueError` for an entry that cannot be.
    """
    module, leaf = owner_of(model, name)
    stack = module.get_parameter(leaf)
    experts, out_features, in_features = stack.shape
    if transposed(module)[leaf]:
        out_features, in_features = in_features, out_features
    if (of := spec.get("of")) not in STACKS:
        raise ValueError(f"of is {of!r:.100}, but experts are stacks of {' or '.join(STACKS)}.")
    most = min(out_features, in_features) - (of == "pivoted")
    ranks = ranks_in(spec, experts, most)
    new = FactorizedExperts(ranks, out_features, in_features, "meta", stack.dtype, of=of)
    if not stack.is_meta:
        new.to_empty(device=stack.device)
    return new.requires_grad_(stack.requires_grad).train(module.training)


def stacks_in(model: nn.Module) -> Iterable[tuple[str, FactorizedExperts]]:
    """The factorised stacks of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FactorizedExperts))
