"""Read models through transformers: silently, completely or not at all, and with errors of one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from eckart.errors import EckartError, ModelError, UserError
from eckart.support import reading
from eckart.support.escaping import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def locate(model: str) -> str | Path:
    """A folder that holds a model, or a hub id as it is. Asks no network."""
    if not model:
        raise ModelError("the name of the model is empty; name a folder or a hub id.")
    try:
        folder = Path(model).expanduser()
        if folder.is_dir():
            if not (folder / CONFIG).exists():
                raise ModelError(f"{model}: has no {CONFIG}, so it is not the folder of a model.")
            read_json(folder / CONFIG, ModelError)  # what we know of it is right before transformers sees it
            return folder
        if folder.exists():
            raise ModelError(f"{model}: is a file; name the folder of a model, or a hub id.")
    except OSError as error:  # no permission to look into it, a name too long
        raise ModelError(f"{plain(model, 1000)}: cannot be read: {error.strerror}.") from None
    except RuntimeError as error:  # ~ of a user who is not there
        raise ModelError(f"{plain(model, 1000)}: no such folder: {plain(error)}") from None
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model!r}: no such folder.")
    return model


def offline(source: str | Path) -> bool:
    """True for a folder, and for a hub id when the hub does not answer: its cache is asked alone then.

    Otherwise transformers would try again and again, for half a minute a file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(source, Path):
        return True
    try:
        HfApi().model_info(source, timeout=10)
    except HfHubHTTPError:
        return False  # it answered; why it refuses is said when the files are asked for
    except Exception:  # whatever the network library raises, which changes with the releases of the hub
        return True
    return False


def read(
    loader: Any,
    source: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    kind: type[UserError],
    trust_remote_code: bool = False,
) -> tuple["PreTrainedModel", list[str], list[str]]:
    """Read a model by `loader.from_pretrained`, with no word printed.

    Returns the model, what it did not get from the files (missing tensors, and those of another
    shape) in words, and the names of tensors in the files that it did not use. The caller must not let a model pass
    that lacks something: transformers has filled it at random. Failures to read are raised as `kind`.
    """
    from eckart.portable import hf  # noqa: F401  registers the quantizer

    with quiet(), unreadable(source, kind, "model"):
        model, info = loader.from_pretrained(
            str(source),
            dtype=dtype or "auto",
            device_map=None if device is None else str(device),
            local_files_only=offline(source),
            trust_remote_code=trust_remote_code,
            # Otherwise transformers raises an error that does not say which tensor it is.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    unmet = [
        f"{key} is {list(shape)} but must be {list(expected)}"
        for key, shape, expected in sorted(info["mismatched_keys"])
    ]
    unmet += _few(sorted(info["missing_keys"]), "missing from the files")
    return model, unmet, sorted(info["unexpected_keys"])


def config_of(source: str | Path) -> dict[str, Any]:
    """The configuration of a folder or a hub id as it is written, before transformers makes anything of it."""
    if isinstance(source, Path):
        return read_json(source / CONFIG, ModelError)
    from transformers import PreTrainedConfig

    with quiet(), unreadable(source, ModelError, "model"):
        config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=offline(source))
    return dict(config)


def native_class(config: Mapping[str, Any]) -> Any:
    """The class that was saved, which is not always what the auto class would choose."""
    import transformers

    names = config.get("architectures") or [""]
    name = names[0] if isinstance(names, list) and isinstance(names[0], str) else ""
    native = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(native, type) and issubclass(native, transformers.PreTrainedModel):
        return native
    return transformers.AutoModelForCausalLM


def _few(keys: list[str], what: str) -> list[str]:
    """At most one phrase, which names at most two of the keys."""
    more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
    return [f"{', '.join(keys[:2])}{more} {'is' if len(keys) == 1 else 'are'} {what}"] if keys else []


def weight_files(folder: Path, kind: type[UserError]) -> list[Path]:
    """The safetensors files of a folder, each known to be there and whole in structure."""
    names: list[str] = []
    if (folder / WEIGHTS).is_file():  # which transformers prefers to an index, too
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        names = _shards(folder / INDEX, kind)
    if not names:
        raise kind(f"{folder}: holds no weights: neither {WEIGHTS} nor an {INDEX} that names shards.")
    for path in (folder / name for name in names):
        if not path.is_file():
            raise kind(f"{path}: is missing, though {INDEX} names it; copy or download the folder again.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise kind(f"{plain(path, 1000)}: is damaged ({plain(error)}); copy or download it again.") from None
    return [folder / name for name in names]


def _shards(path: Path, kind: type[UserError]) -> list[str]:
    """The files that an index names, each beside it."""
    names = sorted(set(read_json(path, kind, _Index).get("weight_map", {}).values()))
    for name in names:
        if not name.isprintable() or len(name) > 255 or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise kind(
                f"{plain(path, 1000)}: weight_map names {reading.shown(name)}, but a shard is a file beside the index."
            )
    return names


MOST_LAYERS = 10_000  # no model has as many, and with more transformers builds for minutes before anything else fails


class _Config(msgspec.Struct):
    """What we look at in a model's configuration; the rest is for transformers to judge."""

    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


def read_json(path: Path, kind: type[UserError], shape: type[msgspec.Struct] = _Config) -> dict[str, Any]:
    """A JSON file of a model, by default its configuration, as plain data; what `shape` names is of its type."""
    data: dict[str, Any] = reading.read_json(path, kind, f"file, so {path.parent} is not the folder of a model")
    reading.checked(data, shape, kind, path)
    models = [data, *(value for value in data.values() if isinstance(value, dict))]  # some hold others
    for part in models:
        for key, value in part.items():
            if key.endswith(("layer", "layers", "blocks", "experts")) and type(value) is int and value > MOST_LAYERS:
                said = f"{plain(key)} is {reading.shown(value)}, but it must be at most {MOST_LAYERS}"
                raise kind(f"{plain(path, 1000)}: {said}.")
    return data


@contextmanager
def unreadable(source: str | Path, kind: type[UserError], what: str) -> Iterator[None]:
    """Turn the many errors of a failed read into one line of ours.

    A file that is damaged, or a figure in a configuration that cannot be, fails wherever it is first used: as
    ZeroDivisionError, AssertionError or EOFError, as an error of a validator or a panic of a library in Rust, which
    Python's `Exception` does not include. All that can raise them is the reading, so all of them mean the same.
    """
    try:
        yield
    except (EckartError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        where = f"no {what} can be read from it"
        if not isinstance(source, Path):
            where = f"no such folder, and no {what} can be read from the hub"
        raise kind(f"{plain(source, 1000)}: {where}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What an error says, on one line; with its name where it says little without."""
    said = plain(" ".join(str(error).split()))
    if isinstance(error, OSError | ValueError | RuntimeError | ImportError) and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines from transformers and the hub meanwhile; afterwards all is as before."""
    import huggingface_hub.utils
    from transformers.utils import logging

    hub: Any = huggingface_hub.utils
    level, hub_level = logging.get_verbosity(), hub.logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
