"""The public verbs of the pipeline: compress a model, plan a compression, look at the spectra."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart import recipes
from eckart.checkpoints.provenance import compress_command
from eckart.model.experts import opened as experts_opened
from eckart.planning import preflight
from eckart.planning.goals import Goal
from eckart.planning.loaded import Loaded
from eckart.planning.planner import decompose_for, make_plan, take_plan
from eckart.planning.prepare import ModelSpec, prepare
from eckart.plans.plan import Plan
from eckart.progress import Progress, Stages, silent
from eckart.recipes import Recipe
from eckart.run import Compression, carry_out
from eckart.support import files
from eckart.support.files import OutputFolder
from eckart.support.work import opened
from eckart.text.calibration import Calibration
from eckart.types import Spectrum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECOMPOSED_BYTES = 12  # of a decomposition on disk, for each parameter of its target, at most


def compress(
    model: "str | PreTrainedModel",
    *,
    recipe: str | Recipe = "eckart",
    keep: float | None = None,
    size: int | str | None = None,
    max_kl: float | None = None,
    bits: float | None = None,
    widths: str | None = None,
    rank_multiple: int = 1,
    storage: str | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Plan | str | Path | None = None,
    calibration: Calibration | None = None,
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    out: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    work: str | Path | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress = silent,
) -> Compression:
    """Compress a model and, if `out` is given, save it there.

    `model` is a hub id, a folder, or a model in memory, which is then changed in place. One of four
    goals: `keep` is the share of the targets' parameters that stays, in (0, 1] (0.8 if no goal is given);
    `size` the most that the weight files may take, in bytes or as "80MB"; `max_kl` the most that the
    predictions may differ from the dense model's, in nats per token, as predicted by recipes that can; or `bits` per
    weight of the targets, all counted. `bits` lets every matrix have few bits, low rank or both (`docs/bits.md`),
    `widths` does so with any goal and says which bits a number may have, as in "4,8".
    `plan` replays a saved plan instead of allocating. `on_plan` is called with the plan before a weight
    is touched. `storage` is how factors are stored, in place of the recipe's choice (pair,
    pivoted), `options` overrides recipe options (`{"factorizer.damping": 1e-4}`).
    `dtype` is the stored one ("auto": the checkpoint's own); half precision is computed in float32 on a CPU.
    `tokenizer` is one, or the name of one, in place of the model's own; `trust_remote_code` runs the code that comes
    with a model whose class transformers does not have.
    `work` is a folder in which long steps keep what they have finished: the same call resumes there.
    Measured curves are kept in the user's cache without it.

    Raises `UserError` for anything the caller can mend, `NumericalError` for NaN while computing.
    """
    full_recipe = recipes.in_few_bits(find_recipe(recipe, options, storage), widths, bits)
    goal = Goal.of(keep, size, max_kl, bits, full_recipe.bits)
    preflight.check_request(full_recipe, goal, device, dtype)
    saved_plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
    stages, folder = Stages(progress), None if work is None else Path(work)
    with ExitStack() as held:
        output = None if out is None else held.enter_context(OutputFolder(out))
        scratch = held.enter_context(opened(folder, output))
        chosen = ModelSpec(model, tokenizer, tuple(include), tuple(exclude), device, dtype, trust_remote_code)
        loaded, text = prepare(
            chosen, calibration or Calibration(), full_recipe, goal, stages,
            plan=saved_plan, output=output, rank_multiple=rank_multiple,
        )  # fmt: skip
        with _spill(scratch, output, loaded) as spill, experts_opened(loaded.model, loaded.layout.targets):
            if saved_plan is None:
                planned = make_plan(
                    loaded, text, full_recipe, goal, rank_multiple=rank_multiple, work=folder, spill=spill,
                    stages=stages,
                )  # fmt: skip
            else:
                planned = take_plan(loaded, text, full_recipe, saved_plan, spill=spill, stages=stages)
            if on_plan is not None:
                on_plan(planned.plan)
            if output is not None:
                files.check_space(output, loaded.ledger(planned.plan).model_bytes_kept)
            flags = {**goal.to_dict(), **({"rank_multiple": rank_multiple} if rank_multiple > 1 else {})}
            flags |= {} if widths is None else {"widths": widths}
            command = partial(
                compress_command,
                loaded.source,
                recipe=recipe.name if isinstance(recipe, Recipe) else recipe,
                goal=flags if plan is None else {"plan": "plan.json" if isinstance(plan, Plan) else plan},
                storage=storage,
                options=options or {},
                include=include,
                exclude=exclude,
                device=device,
                dtype=dtype,
                tokenizer=tokenizer if isinstance(tokenizer, str) else None,
                trust_remote_code=trust_remote_code,
            )
            compression = carry_out(loaded, text, full_recipe, planned, work=folder, stages=stages, command=command)
        if output is not None:
            with stages("save", counts=True):
                compression.save(output)
    return compression


def plan(
    model: "str | PreTrainedModel",
    *,
    recipe: str | Recipe = "eckart",
    keep: float | None = None,
    size: int | str | None = None,
    max_kl: float | None = None,
    bits: float | None = None,
    widths: str | None = None,
    rank_multiple: int = 1,
    storage: str | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    work: str | Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """The plan that `compress` with the same arguments would carry out; no weight is touched."""
    full_recipe = recipes.in_few_bits(find_recipe(recipe, options, storage), widths, bits)
    goal, stages = Goal.of(keep, size, max_kl, bits, full_recipe.bits), Stages(progress)
    folder = None if work is None else Path(work)
    preflight.check_request(full_recipe, goal, device, dtype)
    with opened(folder) as spill:
        chosen = ModelSpec(model, tokenizer, tuple(include), tuple(exclude), device, dtype, trust_remote_code)
        loaded, text = prepare(
            chosen, calibration or Calibration(), full_recipe, goal, stages, rank_multiple=rank_multiple
        )
        with experts_opened(loaded.model, loaded.layout.targets):
            planned = make_plan(
                loaded, text, full_recipe, goal, rank_multiple=rank_multiple, work=folder, spill=spill, stages=stages
            )
    return planned.plan


def spectra(
    model: "str | PreTrainedModel",
    *,
    recipe: str | Recipe = "eckart",
    options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[Spectrum]:
    """The spectrum of every group in the metric of the recipe, before any rank is chosen; no weight is touched."""
    stages, full_recipe = Stages(progress), replace(find_recipe(recipe, options), widths=(), bits=None)
    preflight.check_request(full_recipe, Goal(keep=1.0), device, dtype)
    chosen = ModelSpec(model, tokenizer, tuple(include), tuple(exclude), device, dtype, trust_remote_code)
    loaded, text = prepare(chosen, calibration or Calibration(), full_recipe, Goal(keep=1.0), stages)
    groups = full_recipe.groups(loaded.layout.targets)
    return decompose_for(loaded, text, full_recipe, groups, stages=stages).spectra


def find_recipe(recipe: str | Recipe, options: Mapping[str, Any] | None = None, storage: str | None = None) -> Recipe:
    """The recipe of a name or a file, with options overridden; a `Recipe` keeps its options and takes `storage`."""
    chosen = {} if storage is None else {"storage": storage}
    if isinstance(recipe, Recipe):
        return recipes.override(recipe, chosen)
    return recipes.find(recipe, {**(options or {}), **chosen})


@contextmanager
def _spill(scratch: Path | None, output: OutputFolder | None, loaded: Loaded) -> Iterator[Path | None]:
    """Where decompositions of this run lie in place of memory: the work folder, or else the disk of the output.

    None, memory, without either, and where that disk has no room to spare.
    """
    if scratch is not None or output is None or output.partial is None:
        yield scratch
        return
    needed = DECOMPOSED_BYTES * loaded.layout.target_parameters + loaded.ledger(Plan(())).model_bytes_dense
    if files.free_space(output) < needed:
        yield None
        return
    with tempfile.TemporaryDirectory(
        prefix="decompositions-", dir=output.partial, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
