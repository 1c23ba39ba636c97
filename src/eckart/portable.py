"""Put the code that reads a checkpoint into the checkpoint, for `trust_remote_code=True` without the package.

The code is the package's own: four files that need torch and transformers alone. transformers finds
them by `auto_map` in `config.json` and copies what they import from one another.
"""

import json
import shutil
from pathlib import Path
from typing import Any

FILES = ("modeling_eckart.py", "hf.py", "linear.py", "tensor_parallel.py")


def write_code(folder: Path, model: Any) -> None:
    """Copy the files into a saved `folder` and name them in its `config.json`.

    Nothing is done for a model whose classes transformers does not have: it needs code of its own.
    """
    import transformers

    from eckart.hf import CODE

    classes = {"AutoConfig": type(model.config), "AutoModelForCausalLM": type(model)}
    if not all(issubclass(c, getattr(transformers, c.__name__, ())) for c in classes.values()):
        return
    for name in FILES:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{CODE}.{made.__name__}" for auto, made in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")  # as transformers writes it
