"""Write a model for other tools: a plain dense folder, or a graph for ONNX Runtime or OpenVINO.

The graphs come from transformers' own exporters (marked experimental there). One graph serves the
prompt and every further token: it takes ids of any batch and length and a cache that may be empty,
so the weights are stored once.
"""

import contextlib
import copy
import io
import logging
import os
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eckart.checkpoints import checkpoint, conversion, pretrained
from eckart.checkpoints.admission import refuse_packed
from eckart.errors import ModelError, OptionError
from eckart.portable.experts import stacks_in
from eckart.progress import Progress, silent
from eckart.support import dtypes, files
from eckart.support.extras import require
from eckart.support.not_finite import to_json
from eckart.support.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = ("merged", "onnx", "openvino")
MERGED_NOTE = "The factors were multiplied out: the folder loads everywhere, and the gain in size and speed is gone."


@dataclass(frozen=True)
class Export:
    """What `export` wrote: `bytes` of all files in `out`, `source_bytes` of the weights of the model it was given."""

    out: str
    to: str
    int8: bool
    bytes: int
    source_bytes: int
    note: str

    def to_dict(self) -> dict[str, Any]:
        return {"format": "eckart-export", "version": 1, **asdict(self), "versions": versions()}


def export(model: str | Path, *, to: str, out: str | Path, int8: bool = False, progress: Progress = silent) -> Export:
    """Write `model`, a checkpoint or any dense model, to the new folder `out`, whole or not at all.

    `to` is `merged` (a checkpoint only), `onnx` or `openvino`. `int8` adds, with onnx, ONNX Runtime's
    dynamic quantisation (8-bit weights and activations) and, with openvino, NNCF's 8-bit weights. Graphs
    compute in float32. Raises `OptionError` for an unknown format or a missing package, `ModelError`
    when the exporter cannot trace the model, `OutputError` when `out` is taken.
    """
    if to not in FORMATS:
        raise OptionError(f"to is {to!r}, but must be {', '.join(FORMATS)}.")
    out = Path(os.path.expanduser(out))
    files.check_new_folder(out)
    if to == "merged":
        if int8:
            raise OptionError("int8 goes with onnx and openvino; quantise a merged folder with the tool that reads it.")
        conversion.convert(model, storage="dense", out=out, progress=progress)
        source = _size(Path(model), "*.safetensors")
        return Export(str(out), to, int8, _size(out), source, MERGED_NOTE)
    refuse_packed(model, f"exported to {to}")
    _require(to, int8)
    loaded = checkpoint.load_model(str(model))
    if stack := next(iter(stacks_in(loaded)), None):
        raise ModelError(
            f"{stack[0]}: is a stack of factorised experts, of which no graph can be made for {to} yet; "
            "export the dense model with --to merged first."
        )
    source = sum(p.nbytes for p in loaded.parameters())
    dtypes.cast_(loaded, torch.float32)
    with files.new_folder(out) as partial:
        with _as_one_line(model, to), _silence():
            _export_graph(loaded, to, int8, partial)
        checkpoint.load_tokenizer(model).save_pretrained(partial)
        _write_origin(model, to, int8, partial)
    return Export(str(out), to, int8, _size(out), source, _note(to, int8))


def _export_graph(model: "PreTrainedModel", to: str, int8: bool, folder: Path) -> None:
    from transformers import exporters
    from transformers.exporters.utils import decompose_for_generation

    prompt = torch.arange(8).remainder(model.config.vocab_size).repeat(2, 1)  # only its shape matters
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    # With two tokens at once in the example, the graph takes any number of them: prompt and single steps alike.
    stage, example = decompose_for_generation(model.eval(), inputs, multi_token_decode=True)["decode"]
    stage.config = copy.deepcopy(model.config)
    if hasattr(stage.config, "quantization_config"):
        del stage.config.quantization_config  # which says how layers are stored in a checkpoint, and this is none
    if int8:
        _untie_(stage)
    exporter: Any
    if to == "onnx":
        dynamic = exporters.OnnxRuntimeQuantizer(
            exporters.OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=_saturates())
        )
        exporter = exporters.OnnxExporter()
        config: Any = exporters.OnnxConfig(dynamic=True, quantizer=dynamic if int8 else None)
    else:
        weights = exporters.NNCFOpenVINOQuantizer(exporters.NNCFWeightCompressionConfig()) if int8 else None
        exporter = exporters.OpenVINOExporter()
        config = exporters.OpenVINOConfig(dynamic=True, quantizer=weights)
    exported = exporter.export(stage, example, config)
    exported.generation_config = model.generation_config
    exported.save_pretrained(folder)


def _saturates() -> bool:
    """Whether 8-bit products of this processor saturate: x86 without VNNI adds pairs of them in 16 bits.

    7 bits of weights then leave room for the sum; the graph is right on every processor.
    """
    info = Path("/proc/cpuinfo")
    flags = info.read_text().partition("flags")[2].partition("\n")[0].split() if info.exists() else []
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)


def _untie_(model: "PreTrainedModel") -> None:
    """Give the output embedding a weight of its own: a quantiser takes the tied one for a table to look tokens up in.

    Its product then stays in float32, and in ONNX Runtime the whole table is made float32 again for each token.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is table.weight:
        head.weight = torch.nn.Parameter(table.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _require(to: str, int8: bool) -> None:
    require("export", f"export to {to}", "transformers.exporters")
    if to == "onnx":
        require("export", "export to onnx", "onnx", "onnxscript", *(["onnxruntime"] if int8 else []))
    else:
        require("export", "export to openvino", "openvino", *(["nncf"] if int8 else []))


def _note(to: str, int8: bool) -> str:
    kind = {"onnx": "8-bit weights and activations", "openvino": "8-bit weights"}[to] if int8 else "float32"
    return f"One graph for prompt and single steps, {kind}. Sequences of a batch must have one length (no padding)."


def _write_origin(model: str | Path, to: str, int8: bool, folder: Path) -> None:
    """What the export was made of, beside it; not `provenance.json`, which would make it a checkpoint."""
    provenance = checkpoint.read_provenance(model) if Path(model).is_dir() else {}
    origin = {
        "exported_to": to,
        "int8": int8,
        "from": str(model),
        "exported_with": versions(),
        "checkpoint": provenance,
    }
    (folder / "origin.json").write_text(to_json(origin, indent=1) + "\n", encoding="utf-8")


def _size(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


@contextlib.contextmanager
def _as_one_line(model: str | Path, to: str) -> Iterator[None]:
    """The exporters raise whatever the tools below them raise."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error.__cause__ or error), 300, placeholder=" ...")
        raise ModelError(
            f"{model}: the exporter to {to} of this transformers cannot trace it ({type(error).__name__}: {reason}); "
            f"use --to merged and that tool's own converter."
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters below print to standard output, log and warn about what no user can change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), pretrained.quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
