"""From a name to a model in memory with its text: everything that can be refused is refused on the way, early."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from eckart.planning import preflight
from eckart.planning.goals import Goal
from eckart.planning.loaded import Loaded, Outline, Text, load, outline
from eckart.plans import Plan
from eckart.progress import Stages
from eckart.recipes import Recipe
from eckart.support.files import OutputFolder
from eckart.text.calibration import Calibration
from eckart.text.data import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSpec:
    """Which model, with which tokenizer (None: its own), and how it is to be read."""

    model: "str | PreTrainedModel"
    tokenizer: "str | PreTrainedTokenizerBase | None" = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "auto"
    trust_remote_code: bool = False


def prepare(
    spec: ModelSpec,
    calibration: Calibration,
    recipe: Recipe,
    goal: Goal,
    stages: Stages,
    *,
    plan: Plan | None = None,
    output: OutputFolder | None = None,
    rank_multiple: int = 1,
) -> tuple[Loaded, Text]:
    """The model and its text. Most of what can be wrong is told before a weight is read."""

    def check(known: Outline) -> Windows | None:
        with stages("data"):
            return preflight.check_outline(
                known, calibration, recipe, goal, plan, output, spec.dtype, rank_multiple, named=bool(spec.include)
            )

    known = outline(spec.model, spec.tokenizer, spec.include, spec.exclude, spec.trust_remote_code)
    windows = check(known)
    loaded = load(
        spec.model,
        spec.tokenizer,
        include=spec.include,
        exclude=spec.exclude,
        device=spec.device,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
        known=known,
        stages=stages,
    )
    if known.structure is None:
        windows = check(replace(known, structure=loaded.model, layout=loaded.layout))
    text = Text(calibration, loaded, stages, windows)
    preflight.check_run(loaded, text, recipe, goal, output)
    return loaded, text
