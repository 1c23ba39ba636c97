"""What can be refused before the first costly step is refused here: in seconds, in one place."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from eckart import ledger
from eckart.checkpoints import checkpoint
from eckart.errors import BudgetError, OptionError
from eckart.factorizers.base import Factorizer
from eckart.model.discovery import Layout
from eckart.model.walk import predicts_tokens
from eckart.planning.few_bits import check_no_experts, check_single
from eckart.planning.goals import Goal, header_bytes
from eckart.planning.loaded import Loaded, Outline, Text, fetch
from eckart.plans import Plan, resolve
from eckart.recipes import Recipe
from eckart.support import dtypes, files
from eckart.support.devices import check_device
from eckart.support.files import OutputFolder
from eckart.text.calibration import Calibration
from eckart.text.data import Windows
from eckart.text.fit import check_fit, check_positions
from eckart.text.specs import parse_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_COVERED = 0.2  # of the blocks' parameters: below it no share of the targets makes a model much smaller


def check_request(recipe: Recipe, goal: Goal, device: str, dtype: str) -> None:
    """Before the model is read: every part and option of the recipe, the goal, the device, the dtype.

    Raises `OptionError`.
    """
    recipe.to_dict()  # makes every part
    dtypes.named(dtype)
    if device.startswith("mps"):
        raise OptionError(f"device is {device!r}, which has no float64, as sums of statistics need; use cpu or cuda.")
    check_device(device)
    if recipe.widths:
        _check_few_bits(recipe, goal)
    if goal.max_kl is not None and type(recipe.make_factorizer()).nats is Factorizer.nats:
        raise OptionError(
            "max_kl needs a recipe that predicts the loss, one with factorizer two_sided; "
            "choose another recipe, or ask for keep or size."
        )


def _check_few_bits(recipe: Recipe, goal: Goal) -> None:
    """What cannot be done in few bits yet. Raises `OptionError`."""
    if goal.keep is not None:
        raise OptionError(
            f"keep is {goal.keep:g}, which is a share of numbers, but a plan in few bits is asked for in bits per "
            "weight, bytes or a loss; give bits, size or max_kl in its place."
        )
    if recipe.refiners:
        raise OptionError(
            f"refiner {recipe.refiners[0]} trains factors, which cannot have few bits yet; "
            "set -o refiners=none, or ask for keep in place of bits."
        )
    if not recipe.make_allocator().shares_bytes:
        raise OptionError(
            f"allocator {recipe.allocator} shares out numbers and not bits; take water_level or uniform, "
            "or ask for keep in place of bits."
        )
    if recipe.make_grouping().size != 1:
        raise OptionError("grouping.size is not 1, but what shares a basis cannot have few bits yet; set it to 1.")


def check_outline(
    outline: Outline,
    calibration: Calibration,
    recipe: Recipe,
    goal: Goal,
    plan: Plan | None,
    output: OutputFolder | None,
    dtype: str,
    rank_multiple: int,
    named: bool = False,
) -> Windows | None:
    """Before weights are read: what the recipe needs of the model, a saved plan, the goal, what can be saved, the text.

    `named` says that the caller has named the targets. Returns the windows of the text, None if no text is needed, or
    the model is to write it. Raises the `UserError` that says what is wrong.
    """
    model, layout = outline.structure, outline.layout
    if model is None or layout is None:
        return None
    if (part := recipe.needs_predictions()) and not predicts_tokens(model):
        raise OptionError(
            f"{part} needs the logits of a next token, which {type(model).__name__} does not give; "
            "take a recipe that looks at inputs alone, such as svd-llm."
        )
    if plan is None and not named and goal.keep != 1:
        _check_coverage(model, layout)
    if plan is None and recipe.widths:
        check_no_experts(layout.targets)
    if plan is not None:
        groups, entries = resolve(plan, layout.targets)
        packed = [group for group, entry in zip(groups, entries, strict=True) if entry.bits is not None]
        check_single(packed)
        if packed and recipe.refiners:
            raise OptionError(
                f"{packed[0].name}: has few bits in the plan, and refiner {recipe.refiners[0]} trains factors, which "
                "cannot have few bits yet; set -o refiners=none."
            )
    elif goal.keep is not None:
        groups = recipe.groups(layout.targets)
        ledger.check_reachable(groups, goal.keep, rank_multiple, recipe.storage)
    elif goal.size is not None:
        _check_size(model, layout, goal.size, _least_itemsize(outline, dtype))
    with tempfile.TemporaryDirectory(prefix="eckart-", dir=None if output is None else output.partial) as folder:
        checkpoint.try_saving(model, outline.tokenizer, Path(folder), source=outline.source)
    if not recipe.reads_text():
        return None
    if any(source.kind == "self" for source in parse_spec(calibration.data)):
        check_positions(calibration.length, model)
        return None
    windows = fetch(calibration, outline.tokenizer)
    check_fit(windows, model)
    return windows


def check_run(loaded: Loaded, text: Text, recipe: Recipe, goal: Goal, output: OutputFolder | None = None) -> None:
    """Once the model is read: the range of what is stored as it is, the disk, and that the walk is the model's own.

    Raises the `UserError` that says what is wrong.
    """
    targets = {f"{target.name}.weight" for target in loaded.layout.targets}
    for name, parameter in loaded.model.named_parameters():
        if name not in targets:  # factors are looked at when they are made
            dtypes.check_range(name, parameter.data, loaded.stored_dtype)
    if output is not None:
        least = _least_parameters(loaded.layout, goal.keep or 0) * loaded.stored_dtype.itemsize
        files.check_space(output, least)
    if recipe.reads_text():
        text.read()


def _check_coverage(model: "PreTrainedModel", layout: Layout) -> None:
    """Most of the model is what is asked for; where there is little to cut, the caller has to name it."""
    if layout.covered < LEAST_COVERED:
        part = max(layout.targets, key=lambda target: target.parameters).kind.partition(".")[0]
        raise BudgetError(
            f"{type(model).__name__}: {layout.coverage}; whatever is asked for, the model would stay nearly as it is. "
            f"To compress the targets alone, name them: --include '{part}.*'; `eckart inspect` lists them."
        )


def _least_parameters(layout: Layout, keep: float) -> int:
    return int(layout.parameters - (1 - keep) * layout.target_parameters)


def _least_itemsize(outline: Outline, dtype: str) -> int:
    """Bytes of a stored number, as far as is known before weights are read: at least one."""
    stored = dtypes.named(dtype)
    if stored is None and outline.structure is not None:
        model = outline.structure
        stored = model.dtype if outline.source is None else getattr(model.config, "dtype", None)
    return getattr(stored, "itemsize", 1)


def _check_size(model: "PreTrainedModel", layout: Layout, size: int, itemsize: int) -> None:
    rest = _least_parameters(layout, 0) * itemsize + header_bytes(model.state_dict(), layout.targets)
    if size <= rest:
        raise BudgetError(
            f"size is {size} bytes, but what is never compressed (embeddings, norms, head) takes {rest}; ask for more."
        )
