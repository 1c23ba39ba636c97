"""Save and load checkpoints, and load the models that are to be compressed.

The format is `docs/format.md`. Nothing is ever loaded in part: a weight that the files do not hold,
or that does not fit, is an error here, where transformers would warn and draw it at random.
"""

import logging
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from eckart.checkpoints import admission, beside, card, code, fingerprints, pretrained, spectra_file
from eckart.checkpoints import provenance as provenance_file
from eckart.checkpoints.fused import spare_factors_
from eckart.checkpoints.pretrained import CONFIG
from eckart.errors import CheckpointError, ModelError, PlanError
from eckart.plans.plan import Plan
from eckart.portable.hashes import PROVENANCE
from eckart.support import files, reading
from eckart.support.not_finite import to_json
from eckart.support.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PLAN = "plan.json"


def save(
    model: "PreTrainedModel",
    folder: str | Path | files.OutputFolder,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    plan: Plan | None = None,
    provenance: Mapping[str, Any] | None = None,
    spectra: Sequence[Mapping[str, Any]] = (),
    source: str | Path | None = None,
    own_tokenizer: bool = True,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint to a new folder, whole or not at all, with the code that reads it and a model card.

    `spectra` are summaries by `eckart.plans.figures`, for reports. `provenance` is JSON data; the sizes and hashes
    of the files are added to it, and the versions in use where it has none. What stands beside the weights in
    `source`, the folder or hub id that the model came from, travels along; `own_tokenizer` says that the tokenizer is
    the source's. The model is left ready for its own `save_pretrained`. Raises `PlanError` when the plan is not what
    the model is, `OutputError` when the folder cannot be written.
    """
    from eckart.portable import hf

    output = folder
    folder = output.given if isinstance(output, files.OutputFolder) else Path(output)
    specs = hf.specs_of(model)
    if plan is not None and (difference := _difference(plan, specs)):
        raise PlanError(f"{folder}: not saved, since the plan is not what the model is: {difference}.")
    if not isinstance(output, files.OutputFolder):
        files.check_new_folder(folder)
    files.check_space(folder, sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
    hf.attach_(model, specs)
    spare_factors_(model, specs)
    _say_if_no_auto_class(model)
    with files.new_folder(output) as partial, pretrained.quiet(), _disk_errors(folder):
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if specs:
            code.write_code(partial, model)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if plan is not None:
            write_json(partial / PLAN, plan.to_dict())
        spectra_file.write(partial, spectra)
        if source is not None:
            beside.carry(source, partial, tokenizer=own_tokenizer)
        record = {"versions": versions(), **(provenance or {}), "files": fingerprints.of_folder(partial)}
        write_json(partial / PROVENANCE, record)
        if specs:
            (partial / card.NAME).write_text(card.card(record, plan), encoding="utf-8")


def _say_if_no_auto_class(model: "PreTrainedModel") -> None:
    """Warn where no auto class of transformers gives the model's class, so that only it itself reads what is saved."""
    from transformers.models.auto import modeling_auto

    name, kind = type(model).__name__, model.config.model_type
    mappings = [found for key, found in vars(modeling_auto).items() if key.endswith("MAPPING_NAMES")]
    own_code = type(model).__module__.partition(".")[0] != "transformers"
    if not own_code and not any(name in _several(mapping.get(kind)) for mapping in mappings):
        log.warning(
            "%s: no auto class of transformers gives it; load what is saved by eckart.load, or by "
            "transformers.%s.from_pretrained after `import eckart`.", name, name,
        )  # fmt: skip


def _several(names: object) -> tuple[object, ...]:
    """What a mapping has for a model type: a name, or several."""
    return tuple(names) if isinstance(names, tuple | list) else (names,)


def try_saving(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", scratch: Path, source: str | None = None
) -> None:
    """Save what `save` saves beside weights and plan into an empty folder: what cannot be saved is told now.

    `source` is where the model will be read from, if `model` is its structure alone. Raises `ModelError` with what
    transformers says, for a generation config or a tokenizer that it refuses to write.
    """
    whats: list[tuple[str, Any]] = [("configuration", model.config), ("tokenizer", tokenizer)]
    if (generation := _generation_config(model, source)) is not None:
        whats.insert(1, ("generation configuration", generation))
    for what, part in whats:
        try:
            with pretrained.quiet():
                part.save_pretrained(scratch)
        except OSError as error:
            raise files.output_error(scratch, error) from None
        except Exception as error:  # transformers validates with errors of many classes
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise ModelError(f"{type(model).__name__}: its {what} cannot be saved: {reason}") from None


def _generation_config(model: "PreTrainedModel", source: str | None) -> Any:
    """How a model generates: by its own file, if it is read from somewhere that has one."""
    from transformers import GenerationConfig

    if source is not None:
        with suppress(OSError), pretrained.quiet():  # none there; whether it can be read is seen with the model
            return GenerationConfig.from_pretrained(
                source, local_files_only=pretrained.offline(admission.locate(source))
            )
    return getattr(model, "generation_config", None)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load what `save` wrote: the native class of the model, bit for bit, in evaluation mode.

    `dtype` None keeps the stored one; `device` is a torch device, or "auto" to spread the model.
    `trust_remote_code` runs the code that came with a model whose class transformers does not have.
    `verify` compares the files with the sizes and hashes in the provenance, which reads them once more. Raises
    `CheckpointError` that names the file and the rule.
    """
    folder = Path(folder)
    config, weights = parts(folder)
    admission.check_code(folder, config, trust_remote_code)
    recorded = read_provenance(folder).get("files")
    if verify and recorded is not None:
        fingerprints.check(folder, recorded, weights)
    loader = pretrained.native_class(config)
    model, unmet, unused = pretrained.read(loader, folder, dtype, device, CheckpointError, trust_remote_code)
    unmet += [f"{key} is in the files but not in the model" for key in unused]
    if unmet:
        raise CheckpointError(f"{folder}: the weight files are not what {CONFIG} describes: {unmet[0]}.")
    return model


def parts(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """The configuration of a checkpoint and its weight files, each known to be there and to fit the others.

    Raises `CheckpointError` for a folder that is not a checkpoint, and for parts that contradict one another.
    """
    from eckart.portable import hf

    config = pretrained.read_json(folder / CONFIG, CheckpointError)
    if not is_checkpoint(folder):
        raise CheckpointError(
            f"{folder}: not a checkpoint of eckart: {CONFIG} has no quantization_config with quant_method "
            f"{hf.METHOD!r}, and there is no {PROVENANCE}. Load it as an ordinary model."
        )
    specs = _specs(folder, config)
    plan = read_plan(folder)
    if plan is not None and (difference := _difference(plan, specs)):
        raise CheckpointError(f"{folder / PLAN}: contradicts {CONFIG}: {difference}.")
    return config, pretrained.weight_files(folder, CheckpointError)


def check_structure(folder: Path, weights: Sequence[Path]) -> None:
    """Raise `CheckpointError` unless the heads of the weight files are those of the model that `config.json` says."""
    from eckart.portable import hf, inventory

    model = skeleton(str(folder))
    specs = hf.specs_of(model)
    guard = hf.EckartConfig(specs).guard if specs else ""
    try:
        inventory.check_files(model, specs, guard, weights)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def load_model(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load a dense model from a hub id or a folder, or a checkpoint of eckart through `load`.

    It has the class that it was saved by, its head and whatever stands beside its decoder. Raises `ModelError` when
    there is no such model, its weights are damaged or not all there, or it is one that `admission` refuses.
    """
    source = examine(model, trust_remote_code)
    if isinstance(source, Path) and is_checkpoint(source):
        return load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loader = pretrained.native_class(pretrained.config_of(source))
    loaded, unmet, unused = pretrained.read(loader, source, dtype, device, ModelError, trust_remote_code)
    admission.check_in_memory(loaded)
    if left := admission.check_unused(source, loaded, unused):
        log.warning("%s: not compressed and not saved again, as it is no part of the model: %s", model, ", ".join(left))
    if unmet:
        raise ModelError(f"{model}: the weight files are not what {CONFIG} describes: {unmet[0]}.")
    return loaded


def examine(model: str, trust_remote_code: bool = False) -> str | Path:
    """Where a model is, once all is refused that can be without reading its weights. Raises `ModelError`."""
    source = admission.locate(model)
    if isinstance(source, Path):
        if is_checkpoint(source):
            return source
        if not any(source.glob("pytorch_model*.bin")):
            pretrained.weight_files(source, ModelError)
    config = pretrained.config_of(source)
    admission.check_source(source, config)
    admission.check_code(source, config, trust_remote_code)
    return source


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a hub id, a folder or a checkpoint. Raises `ModelError` when there is none."""
    import transformers

    folder = Path(os.path.expanduser(model))
    # A tokenizer may have a folder of its own.
    source = folder if os.path.isdir(folder) else pretrained.locate(str(model))
    if os.path.isfile(folder / PROVENANCE):
        fingerprints.check_tokenizer(folder, read_provenance(folder).get("files") or {})
    with pretrained.quiet(), pretrained.unreadable(source, ModelError, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            str(source), local_files_only=pretrained.offline(source), trust_remote_code=trust_remote_code
        )
    return tokenizer


def skeleton(model: str, *, dense: bool = False, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of a hub id or a folder on the meta device: all of its structure, none of its weights.

    `dense` gives what a checkpoint of eckart was before its layers were factorised.
    """
    import transformers

    from eckart.portable import hf

    source = admission.locate(model)
    written = pretrained.config_of(source)
    quantization = written.get("quantization_config")
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == hf.METHOD
    if not ours:
        admission.check_source(source, written)
    admission.check_code(source, written, trust_remote_code)
    loader = pretrained.native_class(written)
    with pretrained.quiet(), pretrained.unreadable(source, ModelError, "model"):
        config = transformers.AutoConfig.from_pretrained(
            str(source), local_files_only=pretrained.offline(source), trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            if loader is transformers.AutoModelForCausalLM:
                built = loader.from_config(config, trust_remote_code=trust_remote_code)
            else:
                built = loader(config)
        if ours and not dense:
            hf.EckartQuantizer(hf.EckartConfig.from_dict(config.quantization_config)).preprocess_model(built)
    skeleton: PreTrainedModel = built
    return skeleton


def is_checkpoint(folder: str | Path) -> bool:
    """True for a folder that eckart wrote, be the model in it factorised or dense.

    Raises `ModelError` when its configuration cannot be read.
    """
    folder = Path(folder)
    if os.path.isfile(folder / PROVENANCE):  # False for a name that no folder can have
        return True
    if not os.path.isfile(folder / CONFIG):
        return False
    quantization = pretrained.read_json(folder / CONFIG, ModelError).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "eckart"


def read_plan(folder: str | Path) -> Plan | None:
    """The plan of a checkpoint, None if it has none. Raises `CheckpointError` when it is damaged."""
    path = Path(folder) / PLAN
    try:
        return Plan.load(path) if path.exists() else None
    except PlanError as error:
        raise CheckpointError(str(error)) from None


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """The provenance of a checkpoint, empty if it has none. Raises `CheckpointError` when it is damaged."""
    path = Path(folder) / PROVENANCE
    return provenance_file.read(path) if path.exists() else {}


def _specs(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How each layer is stored, by `config.json`; empty for a dense model."""
    from eckart.portable import hf

    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    if (method := quantization.get("quant_method")) != hf.METHOD:
        found = reading.shown(method)
        raise CheckpointError(f"{folder / CONFIG}: quant_method is {found}, but eckart writes {hf.METHOD!r}.")
    try:
        eckart_config: hf.EckartConfig = hf.EckartConfig.from_dict(quantization)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: quantization_config: {error}") from None
    return eckart_config.modules


def _difference(plan: Plan, stored: Mapping[str, Mapping[str, Any]]) -> str:
    """Where a plan and the layers of a model part ways, in words; empty when they agree."""
    specs = layer_specs(stored)
    sharing: dict[str, list[str]] = {}
    for name, spec in specs.items():
        sharing.setdefault(spec.get("basis_of", name), []).append(name)
    built = {
        name: (
            spec.get("rank"),
            spec.get("storage"),
            sorted(sharing[spec.get("basis_of", name)]),
            spec.get("kept", 0),
            (spec.get("bits"), spec.get("group")),
        )
        for name, spec in specs.items()
    }
    planned = {
        name: (
            entry.rank,
            entry.storage,
            [name] if entry.own_bases else sorted(entry.targets),
            entry.kept or 0,
            (entry.bits, entry.group),
        )
        for entry in plan.entries
        if not entry.is_dense
        for name in entry.targets
    }

    def say(layer: tuple[Any, Any, list[str], Any, tuple[Any, Any]] | None) -> str:
        if layer is None:
            return "dense"
        rank = f"rank {layer[0]}, storage {layer[1]!r}, basis of {' and '.join(layer[2])}"
        columns = f", {layer[3]} columns kept" if layer[3] else ""
        return rank + columns + ("" if layer[4] == (None, None) else f", {layer[4][0]} bits in groups of {layer[4][1]}")

    for name in sorted(planned.keys() | built.keys()):
        if planned.get(name) != built.get(name):
            return f"{name} is {say(planned.get(name))} in the plan, but {say(built.get(name))} in the model"
    return ""


def layer_specs(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """How each factorised layer is stored, with every expert of a stack by itself, as plans have them."""
    from eckart.portable.experts import STORAGE

    specs: dict[str, Mapping[str, Any]] = {}
    for name, spec in stored.items():
        if spec.get("storage") != STORAGE:
            specs[name] = spec
            continue
        of = spec.get("of")
        specs |= {f"{name}.{e}": {"storage": of, "rank": rank} for e, rank in enumerate(spec["ranks"]) if rank}
    return specs


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON that every reader takes, whole or not at all."""
    files.write_text(path, to_json(data, indent=1) + "\n")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """safetensors and tokenizers report a failed write by errors of their own, the latter by `Exception`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or "(os error" in str(error):
            raise files.output_error(folder, error) from None
        raise
