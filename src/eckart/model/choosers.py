"""Linear layers that choose: routers of tokens to experts, and gates, decays and rates that are one number a head.

A cut router sends tokens elsewhere, and there is next to nothing to save in either. They are known by how wide they
are beside the numbers of heads and experts that the configuration names, and by what stands around them.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any

from torch import nn

from eckart.portable.linear import is_linear, shape_of

HEADS = re.compile(r"(\w+_)?(n|num)_(\w+_)?heads?")
EXPERTS = re.compile(r"(\w+_)?(n|num)_((routed|local)_)?experts?")
IDLE_EXPERTS = re.compile(r"zero_expert_num|num_zero_experts")  # that routers may choose beside the real ones


def choosers(config: Any, block: nn.Module) -> dict[str, str]:
    """The linear layers of a block that choose, by their path in it, with what they choose among in words."""
    numbers = dict(_numbers(config.to_dict())) if callable(getattr(config, "to_dict", None)) else {}
    heads = {value for name, value in numbers.items() if HEADS.fullmatch(name)}
    experts = {value for name, value in numbers.items() if EXPERTS.fullmatch(name) and value > 1}
    idle = {value for name, value in numbers.items() if IDLE_EXPERTS.fullmatch(name)}
    # One more than the experts: the choice of none. Twice the root: experts that are found by two keys.
    wide = {e + more for e in experts for more in (0, 1, *idle)} | {2 * isqrt(e) for e in experts}
    linears = {path: module for path, module in block.named_modules() if path and is_linear(module)}
    shapes = {path: shape_of(module) for path, module in linears.items()}
    twins = Counter((path.rpartition(".")[0], shape) for path, shape in shapes.items())
    found: dict[str, str] = {}
    for path, (out, into) in shapes.items():
        alone = twins[path.rpartition(".")[0], (out, into)] == 1  # keys and values, gate and up come in twos
        if alone and out in wide:
            inside = _router(block, path, getattr(config, "hidden_size", None))
            reason = f"chooses among {max(experts)} experts: cut, it would send tokens elsewhere"
            found |= {other: reason for other in linears if other == inside or other.startswith(f"{inside}.")}
        elif heads and (min(out, into) <= max(heads) or (alone and out in {2 * h for h in heads})):
            found.setdefault(path, f"no wider than {max(heads)} heads: one number or two for each")
    return found


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration and of those inside it, those of the whole last."""
    for value in settings.values():
        if isinstance(value, Mapping):
            yield from _numbers({str(name): one for name, one in value.items()})
    for name, value in settings.items():
        if type(value) is int:
            yield name, value


def _router(block: nn.Module, path: str, width: int | None) -> str:
    """The path of the module that a router's last layer stands in: up to what does more than choose."""
    while "." in path:
        above = path.rpartition(".")[0]
        if any(_does_more(module, width) for module in block.get_submodule(above).modules()):
            break
        path = above
    return path


def _does_more(module: nn.Module, width: int | None) -> bool:
    """True for a linear layer that gives hidden states back, and for what else has a weight of its own, as experts."""
    if is_linear(module):
        return shape_of(module)[0] == width
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
