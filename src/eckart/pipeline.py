"""The public verbs of the pipeline: compress a model, plan a compression, look at the spectra."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eckart import files
from eckart.compression import Calibration, Compression
from eckart.goals import Goal
from eckart.plans import Plan
from eckart.progress import Progress, silent
from eckart.provenance import compress_command
from eckart.recipes import Recipe
from eckart.run import Run
from eckart.types import Spectrum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tensor = torch.Tensor


def compress(
    model: "str | PreTrainedModel",
    *,
    recipe: str | Recipe = "eckart",
    keep: float | None = None,
    size: int | str | None = None,
    max_kl: float | None = None,
    rank_multiple: int = 1,
    options: Mapping[str, Any] | None = None,
    plan: Plan | str | Path | None = None,
    calibration: Calibration | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    work: str | Path | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress = silent,
) -> Compression:
    """Compress a model and, if `out` is given, save it there.

    `model` is a hub id, a folder, or a model in memory, which is then changed in place. One of three
    goals: `keep` is the share of the targets' parameters that stays, in (0, 1] (0.8 if no goal is given);
    `size` the most that the weight files may take, in bytes or as "80MB"; `max_kl` the most that the
    predictions may differ from the dense model's, in nats per token, as predicted by recipes that can.
    `plan` replays a saved plan instead of allocating. `on_plan` is called with the plan and what it
    reaches before a weight is touched. `options` overrides recipe options (`{"factorizer.damping": 1e-4}`).
    `dtype` is the stored one ("auto": the checkpoint's own); half precision is computed in float32 on a CPU.
    `work` is a folder in which long steps keep what they have finished: the same call resumes there.
    Measured curves are kept in the user's cache without it.

    Raises `UserError` for anything the caller can mend, `NumericalError` for NaN while computing.
    """
    goal = Goal.of(keep, size, max_kl)
    if out is not None:
        files.check_new_folder(Path(out))  # before any work
    run = Run(model, recipe, options, calibration, tokenizer, include, exclude, device, dtype, work, progress)
    made = run.make_plan(goal, rank_multiple) if plan is None else run.take_plan(plan)
    if on_plan is not None:
        on_plan(made)
    if out is not None:
        files.check_space(Path(out), run.ledger(made).model_bytes_kept)
    run.carry_out(made)
    asked = {**goal.to_dict(), **({"rank_multiple": rank_multiple} if rank_multiple > 1 else {})}
    command = compress_command(
        run.source,
        recipe=recipe.name if isinstance(recipe, Recipe) else recipe,
        goal=asked if plan is None else {"plan": "plan.json" if isinstance(plan, Plan) else plan},
        calibration=run.calibration if run.windows is not None else None,
        options=options or {},
        include=include,
        exclude=exclude,
        device=device,
        dtype=dtype,
    )
    result = run.result(made, command)
    if out is not None:
        with run.timed("save"):
            result.save(out)
    return result


def plan(
    model: "str | PreTrainedModel",
    *,
    recipe: str | Recipe = "eckart",
    keep: float | None = None,
    size: int | str | None = None,
    max_kl: float | None = None,
    rank_multiple: int = 1,
    options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    work: str | Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """The plan that `compress` with the same arguments would carry out; no weight is touched."""
    goal = Goal.of(keep, size, max_kl)
    run = Run(model, recipe, options, calibration, tokenizer, include, exclude, device, dtype, work, progress)
    return run.make_plan(goal, rank_multiple)


def spectra(
    model: "str | PreTrainedModel",
    *,
    recipe: str | Recipe = "eckart",
    options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> list[Spectrum]:
    """The spectrum of every group in the metric of the recipe, before any rank is chosen; no weight is touched."""
    run = Run(model, recipe, options, calibration, tokenizer, include, exclude, device, dtype, None, progress)
    return run.spectra(run.recipe.make_grouping().groups(run.layout.targets))
