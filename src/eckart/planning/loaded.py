"""What is compressed, and the text that it is calibrated on."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eckart import ledger
from eckart.checkpoints import admission, checkpoint
from eckart.errors import ModelError, OptionError
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


@dataclass(frozen=True)
class Outline:
    """A model before its weights are read.

    `structure` is the model on the meta device, or the model itself if it is in memory; None, with `layout`, where it
    cannot be built without weights.
    """

    structure: "PreTrainedModel | None"
    tokenizer: "PreTrainedTokenizerBase"
    layout: Layout | None
    source: str | None
    own_tokenizer: bool


def outline(
    model: "str | PreTrainedModel",
    tokenizer: "str | PreTrainedTokenizerBase | None",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Outline:
    """What is known of a model and its tokenizer without reading a weight.

    Raises `OptionError` for a model in memory without its tokenizer, `ModelError` for what is no model to compress, or
    has nothing to compress.
    """
    source = model if isinstance(model, str) else None
    if source is None and tokenizer is None:
        raise OptionError("a model in memory comes without its tokenizer; pass tokenizer=...")
    if source is not None:
        checkpoint.examine(source, trust_remote_code)
    own = tokenizer is None
    name = source if own else tokenizer
    if isinstance(name, str):
        tokenizer = checkpoint.load_tokenizer(name, trust_remote_code)
    if isinstance(model, str):
        try:
            structure = checkpoint.skeleton(model, trust_remote_code=trust_remote_code)
        except ModelError:  # some classes need numbers to be built; whether it can be read is then seen when it is
            return Outline(None, tokenizer, None, source, own)
    else:
        admission.check_in_memory(model)
        structure = model
    return Outline(structure, tokenizer, discover(structure, include, exclude), source, own)


def load(
    model: "str | PreTrainedModel",
    tokenizer: "str | PreTrainedTokenizerBase | None",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    known: Outline | None = None,
    stages: Stages,
) -> Loaded:
    """Load a model by name, or take one in memory, and find its targets; `known` is its outline, if there is one.

    Raises what `outline` raises, and `ModelError` for weights that cannot be read, or are not finite.
    """
    named = dtypes.named(dtype)
    with stages("load", counts=True):
        known = known or outline(model, tokenizer, include, exclude, trust_remote_code)
        if isinstance(model, str):
            dense = checkpoint.load_model(model, device=device, trust_remote_code=trust_remote_code)
        else:
            dense = model
        stored = named or dense.dtype
        dtypes.cast_(dense, dtypes.compute_dtype(stored, dense.device))
        dense.eval()
    layout = discover(dense, include, exclude)
    log.info("%s: %d targets in %s", type(dense).__name__, len(layout.targets), layout.blocks)
    check_finite(dense, layout.targets)
    return Loaded(dense, known.tokenizer, layout, stored, known.source, known.own_tokenizer)


def fetch(calibration: Calibration, tokenizer: Any, model: Any = None) -> data.Windows:
    """The windows of a calibration, with more of the same text set apart; `model` writes those of the source `self`."""
    spec = asdict(calibration)
    windows = data.load_windows(spec.pop("data"), tokenizer, model=model, spare=UNSEEN, **spec)
    give_back()  # what tokenising left
    log.info("calibration: %s", windows.recipe)
    return windows


@dataclass
class Text:
    """The text of a calibration, read on first use; `windows` is None until then, unless they were fetched before."""

    calibration: Calibration
    loaded: Loaded
    stages: Stages
    windows: data.Windows | None = None
    proven: bool = field(default=False, init=False)

    def read(self) -> data.Windows:
        """The windows, which fit the model, and on which its block walk has proved itself."""
        if self.windows is None or not self.proven:
            loaded = self.loaded
            with self.stages("data"):
                self.windows = self.windows or fetch(self.calibration, loaded.tokenizer, loaded.model)
                check_fit(self.windows, loaded.model)
                prove(loaded.model, residence_of(loaded.model, loaded.layout), self.windows.ids[0])
                self.proven = True
        return self.windows

    def ids(self) -> Tensor:
        """`[windows, length]` token ids on the model's device."""
        return self.read().ids.to(self.loaded.model.device)
