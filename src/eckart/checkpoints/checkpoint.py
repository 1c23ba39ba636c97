"""Save and load checkpoints, and load the models that are to be compressed.

The format is `docs/format.md`. Nothing is ever loaded in part: a weight that the files do not hold,
or that does not fit, is an error here, where transformers would warn and draw it at random.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from eckart.checkpoints import card, code, pretrained, spectra_file
from eckart.checkpoints import provenance as provenance_file
from eckart.checkpoints.pretrained import CONFIG
from eckart.errors import CheckpointError, ModelError, PlanError
from eckart.plans.plan import Plan
from eckart.support import files, reading
from eckart.support.not_finite import to_json
from eckart.support.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN, PROVENANCE = "plan.json", "provenance.json"


def save(
    model: "PreTrainedModel",
    folder: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    plan: Plan | None = None,
    provenance: Mapping[str, Any] | None = None,
    spectra: Sequence[Mapping[str, Any]] = (),
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint to a new folder, whole or not at all, with the code that reads it and a model card.

    `spectra` are summaries by `eckart.plans.figures`, for reports. `provenance` is JSON data; the sizes and hashes
    of the weight files are added to it, and the versions in use where it has none. The model is left ready
    for its own `save_pretrained`. Raises `PlanError` when the plan is not what the model is, `OutputError`
    when the folder cannot be written.
    """
    from eckart.portable import hf

    folder = Path(folder)
    specs = hf.specs_of(model)
    if plan is not None and (difference := _difference(plan, specs)):
        raise PlanError(f"{folder}: not saved, since the plan is not what the model is: {difference}.")
    files.check_new_folder(folder)
    files.check_space(folder, sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
    hf.attach_(model, specs)
    with files.new_folder(folder) as partial, pretrained.quiet(), _disk_errors(folder):
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if specs:
            code.write_code(partial, model)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if plan is not None:
            _write_json(partial / PLAN, plan.to_dict())
        spectra_file.write(partial, spectra)
        written = {path.name: _fingerprint(path) for path in sorted(partial.glob("*.safetensors"))}
        record = {"versions": versions(), **(provenance or {}), "files": written}
        _write_json(partial / PROVENANCE, record)
        if specs:
            (partial / card.NAME).write_text(card.card(record, plan), encoding="utf-8")


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    verify: bool = True,
) -> "PreTrainedModel":
    """Load what `save` wrote: the native class of the model, bit for bit, in evaluation mode.

    `dtype` None keeps the stored one; `device` is a torch device, or "auto" to spread the model.
    `verify` compares the weight files with the sizes and hashes in the provenance, which reads them
    once more. Raises `CheckpointError` that names the file and the rule.
    """
    from eckart.portable import hf

    folder = Path(folder)
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
    weights = pretrained.weight_files(folder, CheckpointError)
    if verify:
        _verify(folder, weights)
    model, unmet, unused = pretrained.read(_native_class(config), folder, dtype, device, CheckpointError)
    if unmet or unused:
        raise CheckpointError(f"{folder}: the weight files are not what {CONFIG} describes: {[*unmet, *unused][0]}.")
    return model


def load_model(
    model: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> "PreTrainedModel":
    """Load a dense model from a hub id or a folder, or a checkpoint of eckart through `load`.

    Raises `ModelError` when there is no such model or its weights are damaged or not all there.
    """
    import transformers

    source = pretrained.locate(model)
    if isinstance(source, Path):
        if is_checkpoint(source):
            return load(source, dtype=dtype, device=device)
        if not any(source.glob("pytorch_model*.bin")):
            pretrained.weight_files(source, ModelError)
    # What is in the files beside the model (another head, a draft model) is no harm to it.
    loaded, unmet, _ = pretrained.read(transformers.AutoModelForCausalLM, source, dtype, device, ModelError)
    if unmet:
        raise ModelError(f"{model}: the weight files are not what {CONFIG} describes: {unmet[0]}.")
    return loaded


def load_tokenizer(model: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a hub id, a folder or a checkpoint. Raises `ModelError` when there is none."""
    import transformers

    source = pretrained.locate(str(model))
    with pretrained.quiet(), pretrained.unreadable(source, ModelError, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            str(source), local_files_only=pretrained.offline(source), trust_remote_code=False
        )
    return tokenizer


def skeleton(model: str, *, dense: bool = False) -> "PreTrainedModel":
    """The model of a hub id or a folder on the meta device: all of its structure, none of its weights.

    `dense` gives what a checkpoint of eckart was before its layers were factorised.
    """
    import transformers

    from eckart.portable import hf

    source = pretrained.locate(model)
    with pretrained.quiet(), pretrained.unreadable(source, ModelError, "model"):
        config = transformers.AutoConfig.from_pretrained(
            str(source), local_files_only=pretrained.offline(source), trust_remote_code=False
        )
        with torch.device("meta"):
            built: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        quantization = getattr(config, "quantization_config", None)
        if not dense and isinstance(quantization, dict) and quantization.get("quant_method") == hf.METHOD:
            hf.EckartQuantizer(hf.EckartConfig.from_dict(quantization)).preprocess_model(built)
    return built


def is_checkpoint(folder: str | Path) -> bool:
    """True for a folder that eckart wrote, be the model in it factorised or dense.

    Raises `ModelError` when its configuration cannot be read.
    """
    folder = Path(folder)
    if (folder / PROVENANCE).is_file():
        return True
    if not (folder / CONFIG).is_file():
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


def _native_class(config: Mapping[str, Any]) -> Any:
    """The class that was saved, which is not always what the auto class would choose."""
    import transformers

    name = (config.get("architectures") or [""])[0]
    native = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(native, type) and issubclass(native, transformers.PreTrainedModel):
        return native
    return transformers.AutoModelForCausalLM


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


def _difference(plan: Plan, specs: Mapping[str, Mapping[str, Any]]) -> str:
    """Where a plan and the layers of a model part ways, in words; empty when they agree."""
    sharing: dict[str, list[str]] = {}
    for name, spec in specs.items():
        sharing.setdefault(spec.get("basis_of", name), []).append(name)
    built = {
        name: (spec.get("rank"), spec.get("storage"), sorted(sharing[spec.get("basis_of", name)]), spec.get("kept", 0))
        for name, spec in specs.items()
    }
    planned = {
        name: (entry.rank, entry.storage, sorted(entry.targets), entry.kept or 0)
        for entry in plan.entries
        if entry.rank is not None
        for name in entry.targets
    }

    def say(layer: tuple[Any, Any, list[str], Any] | None) -> str:
        if layer is None:
            return "dense"
        return f"rank {layer[0]}, storage {layer[1]!r}, basis of {' and '.join(layer[2])}" + (
            f", {layer[3]} columns kept" if layer[3] else ""
        )

    for name in sorted(planned.keys() | built.keys()):
        if planned.get(name) != built.get(name):
            return f"{name} is {say(planned.get(name))} in the plan, but {say(built.get(name))} in the model"
    return ""


def _verify(folder: Path, weights: list[Path]) -> None:
    """Compare the weight files with what the provenance says of them, where it says anything."""
    recorded = read_provenance(folder).get("files")
    if recorded is None:
        return
    if set(recorded) != {path.name for path in weights}:
        raise CheckpointError(f"{folder}: its weight files are not those that {PROVENANCE} names: {sorted(recorded)}.")
    for path in weights:
        actual, saved = _fingerprint(path), recorded[path.name]
        for what in ("bytes", "sha256"):
            if actual[what] != saved[what]:
                raise CheckpointError(
                    f"{path}: is not what was saved: {what} {actual[what]}, but {saved[what]} in {PROVENANCE}; "
                    "copy or download it again."
                )


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(to_json(data, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """safetensors and tokenizers report a failed write by errors of their own, the latter by `Exception`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SafetensorError) or "(os error" in str(error):
            raise files.output_error(folder, error) from None
        raise
