"""What stands beside a model's weights and travels along, bit for bit: processor, licence, pooling, code of others."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from eckart.checkpoints import code, pretrained
from eckart.errors import ModelError

WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|npz|tflite)$|\.index\.json$")
# Written anew with every checkpoint, or what training left.
OURS = re.compile(
    r"(README\.md|config\.json|generation_config\.json|plan\.json|provenance\.json|spectra\.json|trainer_state\.json|"
    r"events\.out.*)"
)
TOKENIZER = re.compile(
    r"(tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.tiktoken|spiece\.model|"
    r"sentencepiece.*|chat_template.*|additional_chat_templates)"
)
MODULES = "modules.json"  # of sentence-transformers: which folders hold the layers that follow the model


def carry(source: str | Path, folder: Path, *, tokenizer: bool) -> None:
    """Copy into `folder` what it does not have yet; `tokenizer` files too if the tokenizer is the source's own.

    `source` is a folder or a hub id. Raises `ModelError` for a hub that does not give its files.
    """
    root = _folder_of(source)
    for path in files_beside(root, tokenizer=tokenizer):
        target = folder / path.relative_to(root)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def files_beside(root: Path, *, tokenizer: bool) -> Iterator[Path]:
    """The files that travel. Weights do only where a list of modules names their folder: those are not the model's."""
    layers, code_of_ours = _layers(root), code.names_in(root)
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if not path.is_file() or any(_passed_over(part) for part in inner.parts):
            continue
        if WEIGHTS.search(path.name) and inner.parts[0] not in layers:
            continue
        if len(inner.parts) == 1 and (OURS.fullmatch(path.name) or path.name in code_of_ours):
            continue
        if tokenizer or not TOKENIZER.fullmatch(inner.parts[0]):
            yield path


def _passed_over(part: str) -> bool:
    return part.startswith((".", "checkpoint-")) or part == "__pycache__"


def _layers(root: Path) -> set[str]:
    """Folders that `modules.json` names."""
    try:
        rows = json.loads((root / MODULES).read_text(encoding="utf-8"))
        paths = {str(row["path"]) for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return set()
    return paths - {""}


def _folder_of(source: str | Path) -> Path:
    if (folder := Path(source).expanduser()).is_dir():
        return folder
    import huggingface_hub

    weights = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx*", "*.ckpt"]
    with pretrained.quiet(), pretrained.unreadable(str(source), ModelError, "file"):
        local = pretrained.offline(str(source))
        return Path(huggingface_hub.snapshot_download(str(source), ignore_patterns=weights, local_files_only=local))
