"""Do the files of a checkpoint hold what its configuration says: looked at before transformers reads them.

transformers warns of a tensor that is missing and draws it at random. A checkpoint is saved whole, so here that is an
error, on the plain road too. Only the heads of the files are read. Travels with checkpoints: torch, safetensors,
transformers.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import safe_open
from torch import nn

FLOATS = ("F64", "F32", "BF16", "F16")
FACTOR = r"\.((basis|coefficients)\.weight|rank_\d+\.(basis|coefficients))$"
Heads = dict[str, tuple[list[int], str]]  # tensors in files by name: shape and dtype


def local_name(model: Any, name: str) -> str:
    """The name of a layer in this model, which may be the saved one without its head, or with another.

    Raises `ValueError` when it has no such layer.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if _has(model, candidate):
            return candidate
    raise ValueError(f"{name}: named in quantization_config, but {type(model).__name__} has no such layer.")


def _has(model: nn.Module, name: str) -> bool:
    try:
        parent, _, leaf = name.rpartition(".")
        # A stack of experts is a parameter of its module until factors take its place.
        return leaf in model.get_submodule(parent)._parameters or model.get_submodule(name) is not model
    except AttributeError:
        return False


def check_files(model: Any, specs: Mapping[str, Mapping[str, Any]], guard: str, files: Iterable[Any]) -> None:
    """Compare safetensors files with the empty model into which they are to be read, factorised layers in place.

    `specs` are the layers by their names in this model. Raises `ValueError` that names the tensor or the blocks.
    """
    own, heads = set(model.state_dict(keep_vars=True)), _heads(files)
    heads.pop(guard, None)
    stored = {_key(model, own, key): head for key, head in heads.items()}
    strange = [key for key in heads if _key(model, own, key) not in own]
    renamed = {key: heads[key] for key in strange}
    for name, spec in specs.items():
        _check_layer(model.get_submodule(name), name, spec, stored, renamed)
    _check_blocks(model, own, stored)
    if not _is_saved_class(model):  # the head that was saved is not asked for
        strange = [key for key in strange if key.startswith(f"{model.base_model_prefix}.")]
    for key in strange:
        if (layer := re.sub(FACTOR, "", key)) != key and _has(model, layer):
            raise ValueError(f"{layer}: is factorised in the weight files, but not named in quantization_config.")
    if not strange:  # else transformers renames tensors of this family as it reads them
        _check_rest(model, own - stored.keys())


def _heads(files: Iterable[Any]) -> Heads:
    heads: Heads = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            slices = ((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118  not a mapping
            heads |= {key: (one.get_shape(), one.get_dtype()) for key, one in slices}
    return heads


def _key(model: Any, own: set[str], key: str) -> str:
    """A tensor's name in this model, as transformers finds it for a model with or without its head."""
    prefix = f"{model.base_model_prefix}."
    if key.startswith(prefix) and (bare := key.removeprefix(prefix)) in own:
        return bare
    return prefix + key if prefix + key in own else key


def _check_layer(layer: nn.Module, name: str, spec: Mapping[str, Any], stored: Heads, renamed: Heads) -> None:
    """Every tensor of a factorised layer is there, with its shape and in a dtype that it can have.

    `renamed` are the tensors in the files that are none of the model's, since transformers renames those of some
    families as it reads them: each may stand for one of the same last name and shape, and is taken out.
    """
    for key, tensor in layer.state_dict(keep_vars=True).items():
        if key == "basis.weight" and "basis_of" in spec:
            continue
        full, shape = f"{name}.{key}", list(tensor.shape)
        if full not in stored:
            alike = (other for other, head in renamed.items() if other.endswith(f".{key}") and head[0] == shape)
            if (other := next(alike, None)) is None:
                raise ValueError(f"{full}: is missing from the weight files; copy or download the checkpoint again.")
            found, dtype = renamed.pop(other)
        else:
            found, dtype = stored[full]
        if found != shape:
            raise ValueError(f"{full}: is {found} in the weight files, but must be {shape}.")
        allowed = FLOATS if tensor.is_floating_point() else ("I32",)
        if dtype not in allowed:
            raise ValueError(f"{full}: is stored as {dtype}, but must be {' or '.join(allowed)}.")


def _check_blocks(model: nn.Module, own: set[str], stored: Heads) -> None:
    """The files hold as many blocks as the model has, in every list of blocks."""
    for path, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList) or not path:
            continue
        here, there = _numbers(own, path), _numbers(stored, path)
        if there and here and max(here) != max(there):
            raise ValueError(
                f"{path}: has {max(here) + 1} entries by config.json, but {max(there) + 1} in the weight files; "
                "copy or download config.json again."
            )


def _numbers(keys: Iterable[str], path: str) -> set[int]:
    found = (re.match(rf"{re.escape(path)}\.(\d+)\.", key) for key in keys)
    return {int(match[1]) for match in found if match}


def _is_saved_class(model: Any) -> bool:
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def _check_rest(model: Any, missing: set[str]) -> None:
    """Nothing else is missing, save what is tied to another tensor, and the head of a model that is given a new one."""
    missing -= set(model.all_tied_weights_keys)
    ignored = model._keys_to_ignore_on_load_missing or ()
    missing = {key for key in missing if not any(re.search(pattern, key) for pattern in ignored)}
    if not _is_saved_class(model) and hasattr(model, model.base_model_prefix):
        prefix = f"{model.base_model_prefix}."
        missing = {key for key in missing if key.startswith(prefix)}
    if missing:
        raise ValueError(f"{min(missing)}: is missing from the weight files; copy or download the checkpoint again.")
