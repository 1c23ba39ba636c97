"""The contract of a refiner: it changes the factors of a compressed model, in place, and nothing else.

Ranks, storage, sharing and the targets that stayed dense remain as the plan says.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.model.discovery import Layout
from eckart.plans.plan import Plan
from eckart.progress import Progress, silent


@dataclass(frozen=True)
class Refinement:
    """What a refiner works on.

    `model` is the compressed model, in computing precision. `dense_weights` maps the name of every
    factorised target to its weight `[out, in]` before compression: with it a dense block can be run
    again, at the price of the dense targets in memory beside their factors. `windows` is `[windows,
    length]` token ids on the model's device, those that the statistics came from; `unseen` `[any, length]` are
    others of the same text, which no statistic has seen: what is fitted to `windows` is judged on them fairly.

    `work` is a folder in which a long refiner may keep finished pieces for a later run (`eckart.support.work`).
    `tokenizer` is for refiners that make text of their own; None where there is none.
    What should travel with the checkpoint about how it went is appended to `notes`, as plain data
    without times: the same run leaves the same notes.
    """

    model: nn.Module
    layout: Layout
    plan: Plan
    dense_weights: Mapping[str, Tensor]
    windows: Tensor
    progress: Progress = silent
    work: Path | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)
    unseen: Tensor | None = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Refiner(ABC):
    """Improves factors that are in place. The fields of the dataclass are the method's options."""

    @property
    def needs_predictions(self) -> bool:
        """Whether it looks at the logits of a next token; others do with hidden states."""
        return False

    def applies(self, keep: float) -> bool:
        """Whether to run at all when the share `keep` of the targets' parameters is left."""
        return True

    @abstractmethod
    def refine_(self, refinement: Refinement) -> None:
        """Change the factors of `refinement.model` in place.

        Raises `NumericalError` naming the module when a result is not finite.
        """
