"""What goes into a run beside the model, and what comes out of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart import checkpoint
from eckart.discovery import Layout
from eckart.ledger import Ledger
from eckart.plans import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Calibration:
    """Which text is calibrated on, and how it becomes windows of tokens (`eckart.data`).

    The defaults are those of the papers: 256 windows of 2048 tokens of WikiText-2.
    """

    data: str = "wikitext2"
    windows: int = 256
    length: int = 2048
    seed: int | None = None
    join: str = "\n\n"
    bos: str = "start"


@dataclass
class Compression:
    """What a run made. `seconds` holds the wall time of each stage; it is not saved with the model.

    `spectra` holds a `density.summary` of every group that was decomposed.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    layout: Layout
    plan: Plan
    ledger: Ledger
    provenance: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    spectra: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint; raises `OutputError` and leaves nothing behind if it cannot."""
        parts = {"tokenizer": self.tokenizer, "plan": self.plan, "provenance": self.provenance}
        checkpoint.save(self.model, folder, **parts, spectra=self.spectra)
