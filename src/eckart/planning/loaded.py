"""What is compressed, and the text that it is calibrated on."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eckart import ledger
from eckart.checkpoints import admission, checkpoint
from eckart.errors import OptionError
from eckart.ledger import Ledger
from eckart.measuring.held_out import WINDOWS as UNSEEN
from eckart.model.discovery import Layout, check_finite, discover
from eckart.model.residence import residence_of
from eckart.model.walk import prove
from eckart.plans import Plan, resolve
from eckart.progress import Stages
from eckart.support import dtypes
from eckart.support.memory import give_back
from eckart.text import data
from eckart.text.calibration import Calibration
from eckart.text.fit import check_fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("eckart.run")


@dataclass
class Loaded:
    """A model that is to be compressed, in its computing dtype.

    `source` is its name, None for a model in memory; `own_tokenizer` says that the tokenizer came from there too.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    layout: Layout
    stored_dtype: torch.dtype
    source: str | None
    own_tokenizer: bool = True

    def ledger(self, plan: Plan) -> Ledger:
        """What a plan costs in the dtype that is stored."""
        groups, entries = resolve(plan, self.layout.targets)
        return ledger.make_ledger(groups, entries, self.layout.parameters, self.stored_dtype.itemsize)


def load(
    model: "str | PreTrainedModel",
    tokenizer: "str | PreTrainedTokenizerBase | None",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    stages: Stages,
) -> Loaded:
    """Load a model by name, or take one in memory, and find its targets.

    Raises `OptionError` for a model in memory without its tokenizer, `ModelError` for what cannot be read or has
    nothing to compress.
    """
    named = dtypes.named(dtype)
    with stages("load", counts=True):
        source = model if isinstance(model, str) else None
        if source is None and tokenizer is None:
            raise OptionError("a model in memory comes without its tokenizer; pass tokenizer=...")
        if isinstance(model, str):
            checkpoint.examine(model, trust_remote_code)
        own = tokenizer is None
        name = source if own else tokenizer
        if isinstance(name, str):
            tokenizer = checkpoint.load_tokenizer(name, trust_remote_code)
        if isinstance(model, str):
            dense = checkpoint.load_model(model, device=device, trust_remote_code=trust_remote_code)
        else:
            admission.check_in_memory(model)
            dense = model
        stored = named or dense.dtype
        dtypes.cast_(dense, dtypes.compute_dtype(stored, dense.device))
        dense.eval()
    layout = discover(dense, include, exclude)
    log.info("%s: %d targets in %s", type(dense).__name__, len(layout.targets), layout.blocks)
    check_finite(dense, layout.targets)
    return Loaded(dense, tokenizer, layout, stored, source, own)


@dataclass
class Text:
    """The text of a calibration, read on first use; `windows` is None until then."""

    calibration: Calibration
    loaded: Loaded
    stages: Stages
    windows: data.Windows | None = field(default=None, init=False)

    def read(self) -> data.Windows:
        """The windows, with more of the same text set apart."""
        if self.windows is None:
            with self.stages("data"):
                spec = asdict(self.calibration)
                self.windows = data.load_windows(
                    spec.pop("data"), self.loaded.tokenizer, model=self.loaded.model, spare=UNSEEN, **spec
                )
                check_fit(self.windows, self.loaded.model)
                prove(self.loaded.model, residence_of(self.loaded.model, self.loaded.layout), self.windows.ids[0])
                give_back()  # what tokenising a whole corpus left
                log.info("calibration: %s", self.windows.recipe)
        return self.windows

    def ids(self) -> Tensor:
        """`[windows, length]` token ids on the model's device."""
        return self.read().ids.to(self.loaded.model.device)
