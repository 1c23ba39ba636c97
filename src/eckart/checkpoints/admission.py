"""What eckart does not take for a model to compress: told by name, as a rule before any weight is read.

A model that is quantised already, an adapter, an encoder with its decoder, files that hold more than the model.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from eckart.checkpoints import pretrained
from eckart.errors import ModelError
from eckart.support.escaping import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
# What quantisers leave beside config.json when they do not write into it.
QUANTISED_BESIDE = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
PRECISE = ("F64", "F32", "BF16", "F16")
# Names that only quantised weights have: codes, their scales and zeros, tables of quantiles.
CODES = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|weight_packed|packed_weight|weight_shape|absmax|quant_map|quant_state\b.*|SCB|"
    r"(weight|input|output|activation|[qkv])_scale(_inv|_2)?|scales|\w*zero_?points?|\w+_blocks)$"
)
# Left in files by older releases and by trainers, and no part of the model: tables that are computed now, heads for
# drafts and for rewards.
HARMLESS = re.compile(
    r"(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$|"
    r"(^|\.)(mtp|mtp_\w+|medusa_head|medusa|eagle|draft(_model)?|v_head|value_head|reward_head|score|classifier)\."
)


def locate(model: str) -> str | Path:
    """A folder that holds a model, or a hub id as it is. Raises `ModelError` for an adapter, alone or beside one."""
    adapter = Path(os.path.expanduser(model)) / ADAPTER
    if os.path.isfile(adapter):  # False for a name that no folder can have, of which `pretrained.locate` speaks
        kind = str(pretrained.read_json(adapter, ModelError).get("peft_type") or "PEFT")
        raise ModelError(
            f"{plain(model, 1000)}: holds a {plain(kind, 50)} adapter ({ADAPTER}): merge it first, with peft's "
            f"AutoPeftModelForCausalLM.from_pretrained({model!r}).merge_and_unload().save_pretrained(DIR) and its "
            "tokenizer saved there too, then compress DIR."
        )
    return pretrained.locate(model)


def refuse_packed(model: str | Path, what: str) -> None:
    """Raise `ModelError` for a checkpoint with layers in few bits, which cannot be `what` yet; reads its head alone."""
    config = Path(os.path.expanduser(model)) / pretrained.CONFIG
    quantization = (
        pretrained.read_json(config, ModelError).get("quantization_config") if os.path.isfile(config) else None
    )
    modules = quantization.get("modules") if isinstance(quantization, Mapping) else None
    for name, spec in modules.items() if isinstance(modules, Mapping) else ():
        if isinstance(spec, Mapping) and "bits" in spec:
            raise ModelError(
                f"{plain(model, 1000)}: {plain(name, 300)} has few bits, which cannot be {what} yet; "
                "write the dense model first, with `eckart convert --storage dense`."
            )


def check_source(source: str | Path, config: Mapping[str, Any]) -> None:
    """Refuse by its configuration and the heads of its files. Raises `ModelError`.

    `source` is a folder, or a hub id of which `config` alone is looked at.
    """
    quantization = config.get("quantization_config") or _text(config).get("quantization_config")
    if quantization or config.get("compression_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        _refuse_quantised(source, str(method or "compressed-tensors"), config)
    if config.get("is_encoder_decoder") and not _is_causal(config):
        name = _architecture(config) or plain(config.get("model_type"))
        raise ModelError(
            f"{plain(source, 1000)}: is an encoder and a decoder ({name}), which take "
            "two texts; eckart compresses decoders that run on token ids alone."
        )
    if isinstance(source, Path):
        for name in QUANTISED_BESIDE:
            if (source / name).is_file():
                _refuse_quantised(source, f"by {name} beside it", config)
        _check_heads(source, config)


def check_code(source: str | Path, config: Mapping[str, Any], trusted: bool) -> None:
    """Refuse a model whose class transformers does not have, unless the code that comes with it is trusted.

    Raises `ModelError`.
    """
    import transformers

    name = _architecture(config)
    what = f"its class ({name or 'unnamed'}, model type {config.get('model_type')!r})"
    known = config.get("model_type") in transformers.CONFIG_MAPPING and (not name or hasattr(transformers, name))
    if known or (trusted and config.get("auto_map")):
        return
    if config.get("auto_map"):
        raise ModelError(
            f"{source}: {what} comes with code of its own; read that code, and if you trust it, pass "
            "--trust-remote-code (trust_remote_code=True)."
        )
    raise ModelError(
        f"{source}: {what} is not one of transformers {transformers.__version__} and its folder brings no code; update "
        "transformers, or load it with its own class (after `import eckart`, that class's from_pretrained reads our "
        "checkpoints too)."
    )


def check_in_memory(model: Any) -> None:
    """Refuse a model in memory that is wrapped by adapters or holds quantised weights. Raises `ModelError`."""
    name = type(model).__name__
    wrapped = next((m for m in model.modules() if type(m).__module__.partition(".")[0] == "peft"), None)
    if wrapped is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name}: carries an adapter: merge it first, with model.merge_and_unload().")
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if quantizer is not None and method != "eckart":
        _refuse_quantised(name, str(getattr(method, "value", method)), {})
    for key, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ModelError(f"{name}: is spread over devices ({key} is a DTensor); pass the whole model.")
        # A subclass of Tensor is how torchao and quanto keep codes; what a code means only they know.
        plain = type(parameter.data) is torch.Tensor and parameter.is_floating_point() and parameter.itemsize > 1
        if not plain:
            what = type(parameter.data).__name__ if type(parameter.data) is not torch.Tensor else parameter.dtype
            _refuse_quantised(name, f"{key} is {what}", {})


def check_unused(source: str | Path, model: "PreTrainedModel", unused: Sequence[str]) -> list[str]:
    """What of the files the model did not use, all of it known to be harmless; `ModelError` for anything else."""
    if codes := [key for key in unused if CODES.search(key)]:
        _refuse_quantised(source, f"its files hold {codes[0]}", model.config.to_dict())
    strange = [key for key in unused if not HARMLESS.search(key)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ModelError(
            f"{plain(source, 1000)}: {plain(strange[0])}{more} in the weight files {'are' if more else 'is'} no part "
            f"of {type(model).__name__}, so what would be compressed is not the model that was saved; load it with the "
            "class that it was saved by, and pass that to eckart.compress."
        )
    return list(unused)


def _refuse_quantised(source: object, how: str, config: Mapping[str, Any]) -> None:
    base = config.get("base_model") or config.get("_name_or_path")
    original = f", {plain(base)}" if isinstance(base, str) and base and base != str(source) else ""
    raise ModelError(
        f"{plain(source, 1000)}: is quantised already ({plain(how)}), so its weights are codes; compress the original "
        f"model{original}, and quantise afterwards."
    )


def _check_heads(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse by dtypes and names in safetensors files: codes, whatever `config.json` says."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a mapping
                one = file.get_slice(key)
                if one.get_dtype() in PRECISE:
                    continue
                # Whole numbers are no weights where they are tables: positions, orders, masks.
                if key.endswith("weight") or CODES.search(key) or one.get_dtype().startswith(("F8", "F4", "F6")):
                    _refuse_quantised(folder, f"{key} is {one.get_dtype()}", config)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else {}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return plain(names[0], 100) if isinstance(names, list) and names else ""


def _is_causal(config: Mapping[str, Any]) -> bool:
    """A decoder that was saved alone, with the configuration of the whole."""
    return _architecture(config).endswith(("ForCausalLM", "LMHeadModel"))
