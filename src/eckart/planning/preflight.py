"""What can be refused before the first costly step is refused here: in seconds, in one place."""

import tempfile
from pathlib import Path

from eckart.checkpoints import checkpoint
from eckart.errors import BudgetError, OptionError
from eckart.factorizers.base import Factorizer
from eckart.model.walk import predicts_tokens
from eckart.planning.goals import Goal, header_bytes
from eckart.planning.loaded import Loaded, Text
from eckart.plans import Plan, resolve
from eckart.recipes import Recipe
from eckart.support import dtypes, files
from eckart.support.devices import check_device
from eckart.support.files import OutputFolder


def check_request(recipe: Recipe, goal: Goal, device: str, dtype: str) -> None:
    """Before the model is read: every part and option of the recipe, the goal, the device, the dtype.

    Raises `OptionError`.
    """
    recipe.to_dict()  # makes every part
    dtypes.named(dtype)
    if device.startswith("mps"):
        raise OptionError(f"device is {device!r}, which has no float64, as sums of statistics need; use cpu or cuda.")
    check_device(device)
    if goal.max_kl is not None and type(recipe.make_factorizer()).nats is Factorizer.nats:
        raise OptionError(
            "max_kl needs a recipe that predicts the loss, one with factorizer two_sided; "
            "choose another recipe, or ask for keep or size."
        )


def check_run(
    loaded: Loaded,
    text: Text,
    recipe: Recipe,
    goal: Goal,
    plan: Plan | None = None,
    output: OutputFolder | None = None,
) -> None:
    """Once the model is read: what the recipe needs of it, a saved plan, the goal, whether it can be saved, the text.

    Raises the `UserError` that says what is wrong.
    """
    if (part := recipe.needs_predictions()) and not predicts_tokens(loaded.model):
        raise OptionError(
            f"{part} needs the logits of a next token, which {type(loaded.model).__name__} does not give; "
            "take a recipe that looks at inputs alone, such as svd-llm."
        )
    _check_range(loaded)
    if plan is not None:
        resolve(plan, loaded.layout.targets)
    elif goal.size is not None:
        _check_size(loaded, goal.size)
    if output is not None:
        files.check_space(output, _least_bytes(loaded, goal))
    with tempfile.TemporaryDirectory(prefix="eckart-", dir=None if output is None else output.partial) as folder:
        checkpoint.try_saving(loaded.model, loaded.tokenizer, Path(folder))
    if recipe.reads_text():
        text.read()


def _least_bytes(loaded: Loaded, goal: Goal) -> int:
    """What the weight files will take at least."""
    layout = loaded.layout
    kept = layout.parameters - (1 - (goal.keep or 0)) * layout.target_parameters
    return int(kept * loaded.stored_dtype.itemsize)


def _check_size(loaded: Loaded, size: int) -> None:
    rest = _least_bytes(loaded, Goal(keep=0.0)) + header_bytes(loaded.model.state_dict(), loaded.layout.targets)
    if size <= rest:
        raise BudgetError(
            f"size is {size} bytes, but what is never compressed (embeddings, norms, head) takes {rest}; ask for more."
        )


def _check_range(loaded: Loaded) -> None:
    """What is stored as it is fits the stored dtype; factors are looked at when they are made."""
    targets = {f"{target.name}.weight" for target in loaded.layout.targets}
    for name, parameter in loaded.model.named_parameters():
        if name not in targets:
            dtypes.check_range(name, parameter.data, loaded.stored_dtype)
