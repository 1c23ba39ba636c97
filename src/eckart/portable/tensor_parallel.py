"""Split factorised layers over devices: the tensor-parallel plan of a model, rewritten for its factors.

A layer that is split by its outputs splits its coefficients and repeats its basis on each device; one
that is split by its inputs splits its basis, sums the `rank` numbers, and repeats its coefficients.
Travels with checkpoints; needs transformers with `transformers.distributed`.
"""

from typing import Any

from torch import nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import TensorParallelLayer

from .experts import FactorizedExperts
from .linear import is_factorized

PREFIX = "eckart_"


def split_factors_(model: nn.Module, plan: dict[str, str]) -> None:
    """Rewrite `plan`, from names with `*` for numbers to styles, for the factorised layers of `model`.

    A style is kept for the dense layers that share such a name. A layer that cannot be split is
    refused by its name when the plan is carried out, not before: most models are never split.
    """
    for name, module in model.named_modules():
        layers = replace_layer_number_by_wildcard(name)
        style = plan.get(layers, "")
        if isinstance(module, FactorizedExperts):
            module.tensor_parallel_name = name
            if style and not style.startswith(PREFIX):
                plan[layers] = PREFIX + style
                ALL_PARALLEL_STYLES.register(PREFIX + style, _Around(style))
            continue
        if not is_factorized(module) or not style or style.startswith(PREFIX):
            continue
        factor = "coefficients" if style.startswith("colwise") else "basis"
        plan[f"{layers}.{factor}"] = style
        plan[layers] = PREFIX + style
        ALL_PARALLEL_STYLES.register(PREFIX + style, _Around(style))
    for name, module in model.named_modules():
        if plan.get(replace_layer_number_by_wildcard(name), "").startswith(PREFIX) and is_factorized(module):
            module.tensor_parallel_name = name  # for the refusal


class _Around(TensorParallelLayer):  # type: ignore[misc]
    """The style of a name that dense and factorised layers share. A pair is left alone: its factors have styles."""

    def __init__(self, style: str) -> None:
        self.style = style

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        _refuse(module, self.style)
        ALL_PARALLEL_STYLES[self.style].shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        _refuse(module, self.style)
        if is_factorized(module):
            return module
        result: nn.Module = ALL_PARALLEL_STYLES[self.style].install_forward(module, mesh)
        return result


def _refuse(module: nn.Module, style: str) -> None:
    stack = next((one for one in module.modules() if isinstance(one, FactorizedExperts)), None)
    if stack is not None:
        raise ValueError(
            f"{stack.tensor_parallel_name}: factorised experts cannot be spread over devices yet; "
            "load without a parallel plan."
        )
    if not is_factorized(module):
        return
    if "bits" in module.spec():
        raise ValueError(
            f"{module.tensor_parallel_name}: a layer of few bits cannot be split over devices yet; "
            "`eckart convert --storage dense` writes the model without them."
        )
    if not module.divisible or not style.startswith(("colwise", "rowwise")):
        raise ValueError(
            f"{module.tensor_parallel_name}: a layer of storage {module.spec()['storage']!r} cannot be split by "
            f"{style!r}; only 'pair' can, by columns or rows. `eckart convert --storage pair` rewrites pivoted layers."
        )
