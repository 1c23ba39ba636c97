"""Put the code that reads a checkpoint into the checkpoint, for `trust_remote_code=True` without the package.

The code is the package's own: the files of `eckart.portable` and of the storages that the checkpoint has, which need
torch and transformers alone. transformers finds them by `auto_map` in `config.json` and copies what they import from
one another, by name: so the one file that is written here names the storages.
"""

import inspect
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from eckart import storages

PORTABLE = Path(storages.__file__).parent.parent / "portable"
FILES = ("modeling_eckart.py", "experts.py", "hf.py", "hashes.py", "inventory.py", "linear.py", "tensor_parallel.py")
AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
)
INDEX = "storages.py"  # in place of the package `eckart.storages`


def write_code(folder: Path, model: Any) -> None:
    """Copy the files into a saved `folder` and name them in its `config.json`.

    Nothing is done for a model whose classes transformers does not have: it needs code of its own.
    """
    import transformers

    from eckart.portable import hf
    from eckart.portable.experts import STORAGE

    classes = {"AutoConfig": type(model.config), _auto_class(model): type(model)}
    if not all(issubclass(c, getattr(transformers, c.__name__, ())) for c in classes.values()):
        return
    names = sorted({spec["storage"] for spec in hf.specs_of(model).values()} - {STORAGE}) or ["pair"]
    for source in {*(PORTABLE / name for name in FILES), *_files_of(names)}:
        shutil.copyfile(source, folder / source.name)
    (folder / INDEX).write_text(_index(names), encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{hf.CODE}.{native.__name__}" for auto, native in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")  # as transformers writes it


def _auto_class(model: Any) -> str:
    """The auto class that opens a model of this class; `AutoModel` for one without a head."""
    import transformers

    for auto in AUTO:
        opened = getattr(transformers, auto)._model_mapping.get(type(model.config), ())
        if type(model).__name__ in {one.__name__ for one in (opened if isinstance(opened, tuple) else (opened,))}:
            return auto
    return "AutoModel"


def names_in(folder: Path) -> set[str]:
    """The files of ours among those of a folder, by name; none where no such code was written."""
    if not (folder / FILES[0]).is_file():
        return set()
    helpers = {path.name for path in Path(storages.__file__).parent.glob("_[a-z]*.py")}
    return {*FILES, INDEX, "base.py", *helpers, *(f"{name}.py" for name in storages.names())}


def _file(module: Any) -> Path:
    return Path(inspect.getfile(module))


def _files_of(names: list[str]) -> set[Path]:
    """The files of these storages, and of those whose layers they make."""
    modules = {f"eckart.storages.{name}" for name in names}
    files: set[Path] = set()
    while modules:
        module = sys.modules[modules.pop()]
        if _file(module) not in files:
            files.add(_file(module))
            others = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
            modules |= {other for other in others if other.startswith("eckart.storages.")}
    return files


def _index(names: list[str]) -> str:
    """What `eckart.storages` is in the package: the storages by name, here those of this checkpoint."""
    classes = {name: type(storages.find(name)).__name__ for name in names}
    imports = "".join(f"from .{name} import {class_name}\n" for name, class_name in classes.items())
    entries = ", ".join(f'"{name}": {class_name}()' for name, class_name in classes.items())
    return f'''"""How the layers of this checkpoint are stored. Written by `eckart.save`."""

from .base import FactorizedLayer, Storage
{imports}
_KNOWN: dict[str, Storage] = {{{entries}}}


def find(name: object) -> Storage:
    """The storage of a name. Raises `ValueError` for one that is not of this checkpoint."""
    if not isinstance(name, str) or name not in _KNOWN:
        raise ValueError(f"storage is {{name!r}}, which the code of this checkpoint does not know; install eckart.")
    return _KNOWN[name]
'''
