"""What several scripts share: a model decomposed once, plans of it in place, two corpora to measure on, reports."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart import Calibration
from eckart.measuring.probes import in_place
from eckart.model.operators import operator
from eckart.planning.decomposed import Decomposed
from eckart.planning.goals import Goal
from eckart.planning.loaded import Text, load
from eckart.planning.planner import Planned, decompose_for, plan_from
from eckart.plans import Plan, resolve
from eckart.progress import Stages
from eckart.recipes import Recipe
from eckart.refiners.base import Refinement
from eckart.support.files import write_text
from eckart.support.versions import versions
from eckart.text.data import load_windows

WINDOWS, TEST_WINDOWS, LENGTH = 32, 8, 512


class Bench:
    """A model and its calibration text. `decompose` it once; then plans are made, and put in place for a while."""

    def __init__(
        self,
        model: str,
        calibration: str,
        *,
        windows: int = WINDOWS,
        include: Sequence[str] = (),
        work: str | None = None,
    ) -> None:
        self.stages, self.work = Stages(), None if work is None else Path(work)
        self.loaded = load(model, None, include=include, stages=self.stages)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.text = Text(Calibration(calibration, windows=windows, length=LENGTH), self.loaded, self.stages)

    def decompose(self, recipe: Recipe) -> Decomposed:
        """By the recipe's grouping and factorizer; what is planned and put in place from now on."""
        groups = recipe.groups(self.loaded.layout.targets)
        self.decomposed = decompose_for(self.loaded, self.text, recipe, groups, stages=self.stages)
        return self.decomposed

    def plan(self, recipe: Recipe, goal: Goal, rank_multiple: int = 1) -> Planned:
        how: dict[str, Any] = {"rank_multiple": rank_multiple, "work": self.work, "stages": self.stages}
        return plan_from(self.decomposed, self.loaded, self.text, recipe, goal, **how)

    @contextmanager
    def in_place(self, plan: Plan) -> Iterator[Refinement]:
        """The factors of a plan in the model, for as long as the context lasts; gives what a refiner works on."""
        groups, entries = resolve(plan, self.loaded.layout.targets)
        names = [name for entry in entries if entry.rank is not None for name in entry.targets]
        dense = {name: operator(self.model, name).weight for name in names}
        windows = self.text.read()
        work = Refinement(
            self.model, self.loaded.layout, plan, dense, windows.ids, work=self.work, unseen=windows.unseen,
            tokenizer=self.tokenizer,
        )  # fmt: skip
        with in_place(self.model, groups, entries, self.decomposed.cut):
            yield work


class Corpora:
    """The first windows of the test text and of Python's documentation, and what the dense `model` says there."""

    def __init__(self, model: nn.Module, tokenizer: Any, test: str) -> None:
        how: dict[str, Any] = {"windows": TEST_WINDOWS, "length": LENGTH, "purpose": "evaluation"}
        specs = {"wikitext-2": test, "python-docs": "python-docs"}
        self.windows = {label: list(load_windows(spec, tokenizer, **how).ids) for label, spec in specs.items()}
        self.dense = {label: [log_probabilities(model, w) for w in found] for label, found in self.windows.items()}

    @property
    def kept_bytes(self) -> int:
        """Of memory that the dense predictions take."""
        return sum(window.nbytes for windows in self.dense.values() for window in windows)

    @torch.inference_mode()
    def figures(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """Perplexity and KL from the dense model in nats per token on each, from one pass."""
        found = {}
        for label, windows in self.windows.items():
            loss = divergence = tokens = 0.0
            for window, reference in zip(windows, self.dense[label], strict=True):
                mine = log_probabilities(model, window)
                loss -= float(mine.gather(1, window[1:, None]).sum(dtype=torch.float64))
                divergence += float((reference.exp() * (reference - mine)).sum(dtype=torch.float64))
                tokens += len(window) - 1
            found[label] = {"perplexity": float(torch.tensor(loss / tokens).exp()), "kl": divergence / tokens}
        return found


@torch.inference_mode()
def log_probabilities(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next token of one window `[length]`: `[length - 1, vocabulary]`, float32."""
    return model(input_ids=window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


def read_report(path: Path, *tables: str) -> dict[str, Any]:
    """What an earlier run has written; without one empty tables of these names, or "rows"."""
    return json.loads(path.read_text()) if path.exists() else {name: {} for name in tables or ("rows",)}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The report as it is now, with the versions in use."""
    write_text(path, json.dumps({**report, "versions": versions()}, indent=1) + "\n")


def named(windows: Any) -> dict[str, Any]:
    """The recipe of a text's windows with file names in the place of paths."""
    recipe = windows.recipe.to_dict()
    parts = [{**part, "source": Path(part["source"]).name} for part in recipe["parts"]]
    return {**recipe, "spec": Path(recipe["spec"]).name, "parts": parts}
