"""Find the decoder blocks of a model and the linear layers inside, by structure alone.

The blocks are the `nn.ModuleList` with the most parameters below the decoder (`get_decoder()` where
the model has one, so that a vision tower is never mistaken for it). Targets are the linear layers
inside. Everything else is reported, with the reason.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eckart.errors import ModelError
from eckart.model.choosers import choosers
from eckart.model.experts import dense_weight, experts_in, targets_in
from eckart.portable.experts import stack_names
from eckart.portable.linear import is_factorized, is_linear, shape_of
from eckart.types import Skipped, Target

if TYPE_CHECKING:
    from typing_extensions import TypeIs


@dataclass(frozen=True)
class Layout:
    """The path of the blocks, the targets in model order, and everything that is left alone.

    `parameters` counts every distinct parameter of the model once (tied weights once), `block_parameters` those of the
    blocks.
    """

    blocks: str
    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    parameters: int
    block_parameters: int

    def in_block(self, index: int) -> list[Target]:
        """The targets of one block, in model order."""
        return [target for target in self.targets if target.block == index]

    def without(self, names: Collection[str], reason: str) -> "Layout":
        """The layout with some targets left alone, for this reason."""
        left = [Skipped(f"{t.name}.weight", t.parameters, reason) for t in self.targets if t.name in names]
        targets = tuple(target for target in self.targets if target.name not in names)
        return replace(self, targets=targets, skipped=(*self.skipped, *left))

    @property
    def target_parameters(self) -> int:
        return sum(target.parameters for target in self.targets)

    @property
    def covered(self) -> float:
        """The share of the blocks' parameters that are targets."""
        return self.target_parameters / self.block_parameters

    @property
    def uncovered(self) -> dict[str, float]:
        """Why the rest of the blocks is left alone, each reason with its share of the blocks, largest first."""
        inside = replace(self, skipped=tuple(s for s in self.skipped if s.name.startswith(f"{self.blocks}.")))
        return {reason: count / self.block_parameters for reason, count in skipped_by_reason(inside).items()}

    @property
    def coverage(self) -> str:
        """What is covered, and why the rest is not, in one line; reasons for less than a hundredth are left out."""
        left = ", ".join(f"{share:.1%} ({why})" for why, share in self.uncovered.items() if share >= 0.01)
        return f"targets are {self.covered:.1%} of the blocks' parameters" + (f"; untouched: {left}" if left else "")


def discover(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Layout:
    """List the targets of a model.

    `include` and `exclude` are shell patterns on the dotted name of a linear layer or on its name
    inside its block (`*.down_proj`, `self_attn.*`); with `include`, only what matches is taken. Layers that choose
    (`eckart.model.choosers`) are taken only if it names them. Experts are matched by the name of their stack as well as
    by their own, which is that and a number (`mlp.experts.down_proj.7`).
    Raises `ModelError` when there is nothing to compress.
    """
    path, blocks = _find_blocks(model)
    targets: list[Target] = []
    reasons: dict[str, str] = {}
    left: list[Skipped] = []
    config, tied = _text_config(model), _tied(model)
    for index, block in enumerate(blocks):
        choosing = {} if include else choosers(config, block)
        for target in _linear_maps(path, block, index):
            reason = _unwanted(target, include, exclude) or choosing.get(target.place)
            if target.expert is None and id(block.get_submodule(target.kind).weight) in tied:
                reason = "one weight in several places, which would have to be cut in all of them at once"
            if reason is None:
                targets.append(target)
            else:
                reasons[f"{target.name}.weight"] = reason
                if target.expert is not None:
                    left.append(Skipped(f"{target.name}.weight", target.parameters, reason))
    if not targets:
        why = f" ({next(iter(reasons.values()))})" if reasons else ""
        raise ModelError(
            f"{type(model).__name__}: no linear layer to compress in {path!r}{why}; eckart factorises "
            "nn.Linear and Conv1D inside decoder blocks."
        )
    skipped = _skipped(model, path, targets, reasons)
    return Layout(
        path,
        tuple(targets),
        (*skipped, *left),
        parameters=sum(p.numel() for p in model.parameters()),
        block_parameters=sum(p.numel() for p in blocks.parameters()),
    )


def _linear_maps(path: str, block: nn.Module, index: int) -> Iterator[Target]:
    """Everything in a block that can be factorised, in model order; the experts of a stack where the stack stands."""
    experts = targets_in(path, block, index)
    for kind, module in block.named_modules():
        name = f"{path}.{index}.{kind}"
        if is_factorized(module):
            raise ModelError(f"{name}: is factorised already; compress the original model instead.")
        for stack in [stack for stack in experts if stack.rpartition(".")[0] == kind]:
            yield from experts[stack]
        if is_linear(module) and kind.rpartition(".")[0] not in experts:
            out_features, in_features = shape_of(module)
            yield Target(name, index, kind, out_features, in_features, module.bias is not None)


def check_finite(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise `ModelError` that names the first target whose weight holds NaN or infinity."""
    for target in targets:
        weight = dense_weight(model, target)
        # A sum is finite only if every term is, save for overflow, which the second test excludes.
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise ModelError(
                f"{target.name}: {bad} of {weight.numel()} weights are NaN or infinite; the checkpoint is "
                "damaged. Download it again, or leave this layer out with --exclude."
            )


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    root = model
    if callable(getattr(model, "get_decoder", None)):
        decoder = model.get_decoder()  # type: ignore[operator]
        root = decoder if isinstance(decoder, nn.Module) else model
    if not any(_is_list(module) for module in root.modules()):
        root = model  # some give their head for the decoder
    prefix = next((name for name, module in model.named_modules() if module is root), "")
    lists = [(n, m) for n, m in root.named_modules() if _is_list(m)]
    if not lists:
        raise ModelError(
            f"{type(model).__name__}: has no list of repeated decoder blocks, so there is nothing to compress."
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return ".".join(part for part in (prefix, name) if part), blocks


def _is_list(module: nn.Module) -> "TypeIs[nn.ModuleList]":
    return isinstance(module, nn.ModuleList) and len(module) > 0


def _text_config(model: nn.Module) -> Any:
    """The configuration of a model's decoder; None for a module without one."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return of_text(decoder=True) if callable(of_text) else config


def _tied(model: nn.Module) -> set[int]:
    """The identities of parameters that the model has under several names."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in names.items() if count > 1}


def _unwanted(target: Target, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a linear layer inside a block is not a target, or None."""

    def hits(patterns: Sequence[str]) -> str | None:
        names = {target.name, target.kind, target.place, target.name.removesuffix(f".{target.expert}")}
        return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)

    if include and not hits(include):
        return "matches no --include pattern"
    if pattern := hits(exclude):
        return f"matches --exclude {pattern}"
    if min(target.out_features, target.in_features) < 2:
        return "a vector: no rank below full"
    return None


def _skipped(model: nn.Module, path: str, targets: Sequence[Target], reasons: dict[str, str]) -> tuple[Skipped, ...]:
    # Every expert is accounted for by itself, whether its stack is one parameter or open.
    target_names = {f"{target.name}.weight" for target in targets} | {
        name
        for at, module in experts_in(model)
        for name in (f"{at}.{inner}" for inner, _ in module.named_parameters())
        if name.startswith(f"{path}.") and _is_of_stack(module, name.removeprefix(f"{at}."))
    }
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    result = []
    for name, parameter in model.named_parameters():
        if name in target_names:
            continue
        shared = [other for other in names[id(parameter)] if other != name]
        reason = reasons.get(name) or _reason(model, name, parameter, path)
        if shared:
            reason += f", tied with {shared[0]}"
        result.append(Skipped(name, parameter.numel(), reason))
    return tuple(result)


def _is_of_stack(module: nn.Module, name: str) -> bool:
    """Whether a parameter of an experts module is one of its stacks, or in one that is open."""
    return name.split(".")[0] in stack_names(module)


def _reason(model: nn.Module, name: str, parameter: torch.Tensor, path: str) -> str:
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return "embedding"
    if parameter.dim() == 1:
        return "bias" if name.endswith("bias") else "vector (norm or scale)"
    if name.endswith("_proj_bias"):
        return "bias"
    if not name.startswith(path + "."):
        return "linear outside the decoder blocks" if is_linear(module) else "outside the decoder blocks"
    if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
        return f"fused 3-D parameter of {type(module).__name__}, which is not used as eckart knows experts"
    return f"parameter of {type(module).__name__}, not a linear layer"


def skipped_by_reason(layout: Layout) -> dict[str, int]:
    """Parameters left alone, added up by reason, largest first."""
    total: Counter[str] = Counter()
    for skipped in layout.skipped:
        total[skipped.reason] += skipped.parameters
    return dict(total.most_common())
