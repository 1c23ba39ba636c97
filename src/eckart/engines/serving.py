"""vLLM serves checkpoints of eckart: its plugin, found by the entry point `vllm.general_plugins`.

vLLM fuses projections (q, k and v; gate and up). Each of the fused layers keeps its own factors here, of
its own rank and storage, beside dense ones. Weights arrive whole and are cut for each device by
`eckart.engines.parts`. The classes stand at module level because vLLM pickles them into its workers.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from eckart import storages
from eckart.engines.parts import assemble, part_of

SERVED = [storage for storage in storages.known() if not storage.packs]
KEYS = tuple(dict.fromkeys(["weight", *(name for storage in SERVED for name in storage.tensors)]))
QKV = {"q": 0, "k": 1, "v": 2}


def register() -> None:
    """Called by vLLM in each of its processes; importing this module has registered the format."""


class FactorizedMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and computes one layer of vLLM, which stands for one or several of the model's."""

    def __init__(self, config: "EckartServing", names: list[str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Parameters under the names of the checkpoint whose loaders only collect what arrives."""
        layer.eckart_sizes = (input_size, input_size_per_partition, output_partition_sizes)
        layer.eckart_dtype = params_dtype
        for key in KEYS:
            child, leaf = key.rpartition(".")[::2]
            if child and not hasattr(layer, child):
                layer.add_module(child, nn.Module())
            empty = torch.empty(0, dtype=params_dtype if leaf == "weight" else torch.int32)
            parameter = nn.Parameter(empty, requires_grad=False)
            parameter.weight_loader = partial(self._collect, key)  # type: ignore[attr-defined]
            (getattr(layer, child) if child else layer).register_parameter(leaf, parameter)

    def _collect(self, key: str, _: nn.Parameter, loaded: torch.Tensor, shard: str | int | None = None) -> None:
        if loaded.numel():  # the guard is empty
            shard = getattr(loaded, "shard_id", shard)  # newer releases say it so
            name = self.names[QKV[shard] if isinstance(shard, str) else shard or 0]
            self.config.loaded.setdefault(name, {})[key] = loaded.clone()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the part of this device in the place of the collectors."""
        self.config.refuse_unclaimed()
        device = layer.weight.device
        for key in dict.fromkeys(key.partition(".")[0] for key in KEYS):
            delattr(layer, key)
        parts = [self._part(layer, i, name, device) for i, name in enumerate(self.names)]
        layer.eckart_parts = nn.ModuleList(parts)
        # vLLM looks at the weight of its layers here and there.
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, device=device), requires_grad=False))

    def _part(self, layer: Any, i: int, name: str, device: torch.device) -> nn.Module:
        input_size, input_here, outputs_here = layer.eckart_sizes
        rank, devices = (0, 1) if isinstance(layer, ReplicatedLinear) else (layer.tp_rank, layer.tp_size)
        copies = 1
        if isinstance(layer, QKVParallelLinear) and i > 0:  # a few key heads may serve more devices
            copies = layer.num_kv_head_replicas
        start, end = 0, input_size
        if isinstance(layer, RowParallelLinear):
            start, end, rank, devices = rank * input_here, (rank + 1) * input_here, 0, 1
        rank, devices = rank // copies, max(1, devices // copies)
        here, out = outputs_here[i], outputs_here[i] * devices
        outputs, inputs = slice(rank * here, (rank + 1) * here), slice(start, end)
        spec, tensors = self.config.modules.get(name), self.config.tensors_of(name, device, layer.eckart_dtype)
        if spec is None:
            return _Dense(tensors["weight"], (out, input_size), name, outputs, inputs)
        try:
            return part_of(assemble(spec, input_size, out, tensors), outputs, inputs)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{name}: cannot be served by vLLM: {' '.join(str(error).split())}") from None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`[..., in]` to `[..., out]` of this device."""
        outputs = [part(x) for part in layer.eckart_parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


class _Dense(nn.Module):
    """A layer that was left dense beside factorised ones in the same fused layer."""

    def __init__(self, weight: torch.Tensor, shape: tuple[int, int], name: str, outputs: slice, inputs: slice) -> None:
        super().__init__()
        if weight.shape != shape:
            raise ValueError(f"{name}: weight is {list(weight.shape)}, but vLLM needs {list(shape)}.")
        self.weight = nn.Parameter(weight[outputs, inputs].contiguous(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


@register_quantization_config("eckart")
class EckartServing(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint as vLLM sees it, and what has been loaded of it so far."""

    def __init__(self, modules: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules: dict[str, dict[str, Any]] = modules
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.claimed: set[str] = set()
        self._bases: dict[str, torch.Tensor] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EckartServing":
        from eckart.portable.experts import STORAGE
        from eckart.portable.hf import EckartConfig

        modules = EckartConfig.from_dict(config).modules  # which checks the version
        for name, spec in modules.items():
            if spec["storage"] == STORAGE:
                raise ValueError(
                    f"{name}: is a stack of factorised experts, which vLLM cannot compute with yet; serve the dense "
                    "model that `eckart convert --storage dense` writes."
                )
        if packed := sorted(name for name, spec in modules.items() if storages.find(spec["storage"]).packs):
            raise ValueError(
                f"{packed[0]}: has few bits, which cannot be served by vLLM yet ({len(packed)} such layers); "
                "serve the dense model that `eckart convert --storage dense` writes."
            )
        return cls(modules)

    @classmethod
    def get_name(cls) -> str:
        return "eckart"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """The bias of a pair is the bias of the layer, which vLLM cuts and adds itself."""
        return WeightsMapper(orig_to_new_substr={".coefficients.bias": ".bias"})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        if not self.modules.keys() & set(names):
            return UnquantizedLinearMethod()
        self.claimed.update(names)
        return FactorizedMethod(self, names)

    def refuse_unclaimed(self) -> None:
        """A factorised layer that no layer of vLLM stands for would be left out in silence."""
        from vllm.distributed import get_pp_group

        if get_pp_group().world_size == 1 and (left := sorted(self.modules.keys() - self.claimed)):
            raise ValueError(
                f"{left[0]}: is factorised, but vLLM builds no linear layer of that name ({len(left)} such); "
                "serve the dense model that `eckart convert --storage dense` writes."
            )

    def tensors_of(self, name: str, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What was loaded of a layer, on its device; a shared basis is the same tensor for all its readers."""
        tensors = self.loaded.pop(name, {})
        owner = self.modules.get(name, {}).get("basis_of", name)
        if "basis.weight" in tensors:
            self._bases[name] = tensors["basis.weight"].to(device, dtype)
        elif owner != name and owner not in self._bases and "basis.weight" in self.loaded.get(owner, {}):
            self._bases[owner] = self.loaded[owner]["basis.weight"].to(device, dtype)
        elif owner != name and owner not in self._bases:
            raise ValueError(f"{name}: reads the basis of {owner}, which is on another pipeline stage of vLLM.")
        on_device = {key: t.to(device, dtype if t.is_floating_point() else None) for key, t in tensors.items()}
        return on_device | ({"basis.weight": self._bases[owner]} if owner in self._bases else {})
