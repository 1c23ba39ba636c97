"""Teach transformers to load and save factorised models: a quantizer named `eckart`, registered on import.

Needs torch, transformers and the files that travel with it alone, since a checkpoint holds it
(`modeling_eckart.py`). What stands in a checkpoint, and why, is in `docs/format.md`.
"""

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .experts import (
    STORAGE,
    FactorizedExperts,
    check_stack,
    empty_stack,
    is_dense_stack,
    put_dense_,
    put_stack_,
    stacks_in,
    transposed,
)
from .hashes import check_hashes
from .inventory import check_files, local_name
from .linear import empty_like, is_factorized, is_linear, share_basis_, swap_, weight_view

try:
    from eckart.storages import find
except ImportError:  # in a checkpoint, beside this file
    from .storages import find  # type: ignore[import-not-found, no-redef]

METHOD = "eckart"
CODE = "modeling_eckart"  # the file that `auto_map` of a checkpoint names
FORMAT_VERSION = 1
Specs = dict[str, dict[str, Any]]


class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint: for each factorised layer, how it is stored.

    `EckartConfig(verify=True)`, handed to `from_pretrained`, compares the files with the hashes in `provenance.json`.

    `modules` maps the dotted name of a layer to `{"storage": "pair", "rank": r}`, with
    `"basis_of": other` when the layer reads the basis that `other` owns, or to
    `{"storage": "pivoted", "rank": r, "pivots": "rows"}`; that of a stack of experts to
    `{"storage": "experts", "of": "pair", "ranks": [r, ...]}`. Raises `ValueError` for a
    newer format, an empty `modules` and a `basis_of` that names no owner.
    """

    def __init__(
        self, modules: Specs | None = None, format_version: int = FORMAT_VERSION, verify: bool = False, **_: Any
    ) -> None:
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version is {format_version!r:.100}, but this eckart reads up to {FORMAT_VERSION}; "
                "install a newer eckart."
            )
        self.verify = verify
        if verify and modules is None:  # a wish for loading; transformers takes it over into the checkpoint's own
            modules = {}
        elif not isinstance(modules, dict) or not modules:
            raise ValueError(f"modules is {modules!r:.100}, but it must map at least one layer to its storage.")
        for name, spec in modules.items():
            _check_module(name, spec)
        for name, spec in modules.items():
            owner = spec.get("basis_of")
            if owner is not None and "basis_of" in modules.get(owner, {"basis_of": None}):
                raise ValueError(f"{name}: basis_of is {owner!r}, which is not a layer that owns its basis.")
            for reader in () if owner is None else (spec, modules[owner]):
                if not find(reader.get("storage")).shares_basis:
                    kind = reader["storage"]
                    raise ValueError(f"{name}: basis_of is {owner!r}, but a layer of storage {kind!r} shares no basis.")
        self.quant_method = METHOD
        self.format_version = format_version
        self.modules = modules

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a configuration that is handed to `from_pretrained` changes in the checkpoint's own."""
        return {"verify": self.verify}

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it: whether to compare hashes is not of the checkpoint."""
        return {key: value for key, value in super().to_dict().items() if key != "verify"}

    @property
    def guard(self) -> str:
        """Key of the empty tensor that makes a reader fail who does not know this format."""
        first = min(self.modules)
        return first if self.modules[first].get("storage") == STORAGE else f"{first}.weight"


def _check_module(name: Any, spec: Any) -> None:
    """Raise `ValueError` unless a name can be that of a layer, and its entry holds texts and whole numbers.

    By hand, since this file travels: names go into messages, and may come from anybody.
    """
    usual = isinstance(name, str) and name.isprintable() and not any(c in name for c in " /\\") and len(name) <= 300
    if not usual or not all(name.split(".")):
        raise ValueError(f"modules names {name!r:.100}, which cannot be the name of a layer.")
    if not isinstance(spec, dict):
        raise ValueError(f"modules[{name!r}] is {spec!r:.100}, but it must be an object.")
    if spec.get("storage") == STORAGE and not isinstance(spec.get("ranks"), list):
        raise ValueError(f"{name}: is a stack of experts, but ranks is {spec.get('ranks')!r:.100}, not a list of them.")
    for key, value in spec.items():
        text = isinstance(value, str) and value.isprintable() and len(value) <= 300
        number = type(value) is int and abs(value) < 2**31
        numbers = isinstance(value, list) and all(type(one) is int and abs(one) < 2**31 for one in value)
        if not isinstance(key, str) or not (text or number or (numbers and key == "ranks")):
            raise ValueError(f"{name}: {key!r:.100} is {value!r:.100}, but it must be a text or a whole number.")


class EckartQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts factorised layers into the empty model before transformers reads the weights into it."""

    requires_calibration = True  # a dense model cannot be quantized on the fly by naming this method

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse a map that cannot work, which would fail with a word on meta devices."""
        for name, spec in self.quantization_config.modules.items() if isinstance(device_map, dict) else ():
            owner = spec.get("basis_of", name)
            if _device_of(owner, device_map) == "disk" != _device_of(name, device_map):
                raise ValueError(
                    f"device_map: {name} reads the basis of {owner}, which is on disk; put {name} there too, "
                    f"or {owner} where {name} is."
                )
        return device_map

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        config: EckartConfig = self.quantization_config
        if config.verify:
            check_hashes(checkpoint_files or ())
        guard = config.guard
        # A model that is read without its head, or with another, has other names for the same layers.
        config.modules = _in_terms_of(model, config.modules)
        for name, spec in config.modules.items():
            _put_empty_(model, name, spec)
        _tie_(model, config.modules)
        forget_code_(model)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        names = "|".join(re.escape(key) for key in {guard, config.guard})
        model._keys_to_ignore_on_load_unexpected = {*ignored, f"^({names})$"}
        if checkpoint_files and all(str(path).endswith(".safetensors") for path in checkpoint_files):
            check_files(model, config.modules, guard, checkpoint_files)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        for name, spec in self.quantization_config.modules.items():
            try:
                if spec["storage"] == STORAGE:
                    check_stack(model.get_submodule(name))
                    continue
                find(spec["storage"]).check(model.get_submodule(name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        # accelerate reads the weights of an offloaded layer by that layer's name. A shared basis is in no file
        # under its user's name, and transformers adds the name only where its owner is offloaded as well.
        for name, spec in self.quantization_config.modules.items():
            if "basis_of" not in spec:
                continue
            hook = getattr(model.get_submodule(f"{name}.basis"), "_hf_hook", None)
            stored = getattr(getattr(hook, "weights_map", None), "dataset", None)
            if stored is not None and f"{name}.basis.weight" not in [*stored]:
                owner = model.get_submodule(spec["basis_of"])
                stored.state_dict[f"{name}.basis.weight"] = owner.basis.weight
                stored.all_keys.append(f"{name}.basis.weight")

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes: the model's own and the guard."""
        config: EckartConfig = self.quantization_config
        keep_stacks_(model)
        state: dict[str, torch.Tensor] = model.state_dict()
        # Without eckart, transformers would only warn and fill the dense layers at random. An empty
        # tensor under the name of one of them is a size mismatch, and that it refuses.
        state[config.guard] = torch.zeros(0, dtype=model.dtype)
        return state, {}  # no metadata: safetensors writes more than one entry in random order

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        if plan:
            from .tensor_parallel import split_factors_

            split_factors_(model, plan)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `model.dequantize()` does: the product of the factors in place of each factorised layer."""
        new_dtype = None if dtype == model.config.dtype else dtype  # transformers fills in the stored dtype
        densify_(model)
        return model if new_dtype is None else model.to(new_dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # or Trainer refuses the model, although its factors are ordinary parameters

    @property
    def is_compileable(self) -> bool:
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(EckartQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(EckartConfig)
if EckartConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
    # Kinds of which transformers takes over what the caller asks of loading; it has no call to add one.
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, EckartConfig)


def own_bases_(model: Any) -> int:
    """Give each layer that reads another's basis a copy of its own; returns how many did.

    For FSDP, which shards blocks apart and refuses a tensor that two of them share. Trained apart, the copies part
    ways; the next checkpoint stores each of them.
    """
    readers = [name for name, spec in specs_of(model).items() if "basis_of" in spec]
    for name in readers:
        layer = model.get_submodule(name)
        shared = layer.basis.weight
        layer.basis.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        layer._tied_weights_keys = None
        model.all_tied_weights_keys.pop(f"{name}.basis.weight", None)
    if readers:
        attach_(model, specs_of(model))
    return len(readers)


def _device_of(name: str, device_map: dict[str, Any]) -> Any:
    """Where a map puts a layer: by the longest of its names that the map has."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def specs_of(model: nn.Module) -> Specs:
    """How each factorised layer of a model is stored; empty for a dense model.

    Layers that read one basis tensor share it: the first in model order owns it.
    """
    specs: Specs = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if is_factorized(module):
            specs[name] = module.spec()
            if not find(specs[name]["storage"]).shares_basis:
                continue
            owner = owners.setdefault(id(module.basis.weight), name)
            if owner != name:
                specs[name]["basis_of"] = owner
        elif isinstance(module, FactorizedExperts):
            specs[name] = module.spec()
    return specs


def attach_(model: Any, specs: Specs) -> None:
    """Make a model that was factorised in memory one that plain `save_pretrained` can write.

    Ties the shared bases that `specs` names; without specs there is nothing to do. Raises
    `ValueError` when the model already belongs to another quantization method.
    """
    if not specs:
        return
    present = getattr(model, "hf_quantizer", None)
    if present is not None and present.quantization_config.quant_method != METHOD:
        raise ValueError(
            f"{type(model).__name__}: is quantized by {present.quantization_config.quant_method!r}; "
            "eckart saves only models without another quantization. Factorise the original model."
        )
    quantizer = EckartQuantizer(EckartConfig(specs))
    _tie_(model, specs)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD
    quantizer.postprocess_model(model)


def dense_skeleton(model: Any) -> Any:
    """The model as it was before it was factorised, on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


@torch.no_grad()
def densify_(model: Any) -> None:
    """Put the product of the factors, in their dtype, into a dense layer of the kind that was there."""
    skeleton = dense_skeleton(model)
    for name, stack in list(stacks_in(model)):
        weight = stack.weight
        if weight.is_meta:
            raise ValueError(f"{name}: is offloaded, so its product cannot be computed; load without device_map first.")
        module, leaf = skeleton.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weight = weight.transpose(-2, -1).contiguous() if transposed(module)[leaf] else weight
        put_dense_(model, name, nn.Parameter(weight, requires_grad=next(stack.parameters()).requires_grad))
    for name in specs_of(model):
        old = model.get_submodule(name)
        weight = old.weight
        if weight.is_meta:
            raise ValueError(f"{name}: is offloaded, so its product cannot be computed; load without device_map first.")
        dense = skeleton.get_submodule(name).to(weight.dtype).to_empty(device=weight.device)
        weight_view(dense).copy_(weight)
        if old.bias is not None:
            dense.bias.copy_(old.bias)
        trained = next((p.requires_grad for p in old.parameters()), False)
        swap_(model, name, dense.requires_grad_(trained).train(old.training))
        model.all_tied_weights_keys.pop(f"{name}.basis.weight", None)


def forget_code_(model: Any) -> None:
    """Take the code that travelled with a checkpoint out of the configuration of a native model.

    Its own `save_pretrained` does not copy that code, and a configuration must not name files that are
    not there. `eckart.save` writes both; transformers does for a model that was loaded by that code.
    """
    code = getattr(model.config, "auto_map", None)
    if code and not model.is_remote_code():
        rest = {k: ref for k, ref in code.items() if not str(ref).split("--")[-1].startswith(CODE + ".")}
        model.config.auto_map = rest
        if not rest:
            del model.config.auto_map


def _in_terms_of(model: Any, specs: Specs) -> Specs:
    """The layers of a checkpoint under the names that they have in this model."""
    names = {name: local_name(model, name) for name in specs}
    readers = {name: {"basis_of": names[spec["basis_of"]]} for name, spec in specs.items() if "basis_of" in spec}
    return {names[name]: {**spec, **readers.get(name, {})} for name, spec in specs.items()}


def _put_empty_(model: nn.Module, name: str, spec: dict[str, Any]) -> None:
    """Replace the dense layer `name` by an empty one of the storage that `spec` says."""
    if spec["storage"] == STORAGE:
        _put_empty_stack_(model, name, spec)
        return
    if is_dense_stack(model, name):
        raise ValueError(f"{name}: is a stack of experts, so its storage is {STORAGE!r}, not {spec['storage']!r}.")
    old = model.get_submodule(name)
    if not is_linear(old):
        raise ValueError(f"{name}: named in quantization_config, but it is a {type(old).__name__}, not a linear layer.")
    try:
        swap_(model, name, empty_like(old, spec))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    parent = model.get_submodule(name.rpartition(".")[0])
    if not any(True for _ in parent.parameters(recurse=False)) and not any(True for _ in parent.buffers(recurse=False)):
        # GPT-2 initialises `c_proj.weight` from its parent; here that is a product, computed in vain.
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _put_empty_stack_(model: nn.Module, name: str, spec: dict[str, Any]) -> None:
    if not is_dense_stack(model, name):
        raise ValueError(f"{name}: named in quantization_config, but it is no stack of experts that eckart knows.")
    try:
        put_stack_(model, name, empty_stack(model, name, spec))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    # Its class would draw the stack anew; that nothing is missing in the files is seen to before.
    model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]


def keep_stacks_(model: Any) -> None:
    """Take from a model the conversions of transformers that would unpack its factorised stacks as it is saved.

    Families whose files have a matrix for each expert are saved so; factors of a stack are not to be taken apart.
    """
    keys = [f"{name}.{tensor}" for name, stack in stacks_in(model) for tensor in ("weight", *stack.state_dict())]
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter
    except ImportError:  # earlier ones, which convert nothing
        return
    known: Any = getattr(model, "_weight_conversions", None)
    if known is None and keys:  # not read from files: what the family has; prefixes are for files that had none
        known = [
            one for one in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(one, PrefixChange)
        ]

    def unpacks(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        pattern = conversion.reverse_transform().compiled_sources
        return any(pattern.search(key) for key in keys)

    if keys:
        model._weight_conversions = [one for one in known if not unpacks(one)]


def _tie_(model: Any, specs: Specs) -> None:
    """Let layers with `basis_of` read their owner's basis, and tell transformers that they do."""
    for name, spec in specs.items():
        owner = spec.get("basis_of")
        if owner is None:
            continue
        user = model.get_submodule(name)
        share_basis_(model.get_submodule(owner), user)
        tied = f"{owner}.basis.weight"
        user._tied_weights_keys = {"basis.weight": tied}  # save_pretrained then writes one copy
        model.all_tied_weights_keys[f"{name}.basis.weight"] = tied  # from_pretrained then misses none
