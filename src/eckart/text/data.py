"""Text becomes windows: a `--data` spec and a tokenizer give `[windows, length]` token ids with their recipe.

A spec is one source, or several with commas; `:N` at its end asks for N windows (`wikitext2:64,notes.txt:16`).

    wikitext2, ptb, c4            corpora of the hub, as the papers use them
    name:config:split:column      any corpus of the hub, or a folder; every field but the name may be empty
    notes.txt                     one text
    rows.jsonl[:column]           one text a row; .json (rows in a list, or one a line) and .parquet as well
    python-docs[:half]            the language reference inside Python; half is first, second or all
    self                          text that the model itself writes

A column may lie inside objects (`rows.jsonl:meta.text`). Without one the text is `text`, else the chats (`messages`,
`conversations`), else the only column of strings where nothing nested stands beside it; what is not plain is refused.
Chats become text by the tokenizer's chat template (`eckart.text.chat`). The recipe says the column and the rendering.

The texts of a source are joined and tokenised once, then cut into windows that do not overlap; the tail is
dropped. Without a seed they come from the start; a seed draws them at random, each at most once.

No more is read than needed for the windows asked for (`eckart.text.tokens`): of rows, which are texts apart, up to
`AMPLE` characters for each token; of a text file as many, but `SMALL` bytes at least. A seed then
draws the rows, or the pieces of the text, as well. The recipe says so (`reading`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.errors import DataError, OptionError
from eckart.text.recipe import DataRecipe, SourceRecipe, hash_tokens
from eckart.text.self_text import write_windows
from eckart.text.sources import check_files, open_source
from eckart.text.specs import Purpose, SourceSpec, label, parse_spec
from eckart.text.tokens import AMPLE, SMALL, Reading, ample, bos_id, lead_of, read_tokens

__all__ = [
    "AMPLE", "SMALL", "DataRecipe", "SourceRecipe", "SourceSpec", "Windows", "hash_tokens",
    "load_windows", "parse_spec", "share_windows",
]  # fmt: skip

BOS = ("none", "start", "window")


@dataclass(frozen=True)
class Windows:
    """Token ids `[windows, length]`, int64, on the CPU.

    `unseen` `[at most as many as asked, length]` are further windows of the same sources, evenly spaced behind
    those of `ids`, for measuring on text that was not calibrated on. `tail` `[fewer than length]` is what the
    last source had left behind its last window; only D-Rank's protocol reads it, and it is empty when the
    windows do not end with the text.
    """

    ids: Tensor
    tail: Tensor
    recipe: DataRecipe
    unseen: Tensor


@dataclass(frozen=True)
class _Request:
    length: int
    purpose: Purpose
    unseen: int
    reading: Reading

    @property
    def per_window(self) -> int:
        """Tokens of text in a window."""
        return self.length - (self.reading.bos == "window")


def load_windows(
    spec: str,
    tokenizer: Any,
    *,
    windows: int | None,
    length: int,
    seed: int | None = None,
    purpose: Purpose = "calibration",
    join: str = "\n\n",
    bos: str = "start",
    spare: int = 0,
    model: Any = None,
) -> Windows:
    """Windows of token ids from the sources of `spec` (see the module), `[windows, length]`.

    `windows` None takes every whole window; several sources share `windows` evenly, the first taking what is
    left over; counts in the spec win over `windows`. `purpose` chooses the default split: train or the first
    half to calibrate, test (c4: validation) or the second half to evaluate. `bos`: "start" puts the tokens that
    the tokenizer itself puts before a text once at the start of each source, "window" puts the BOS token at the
    start of each window, "none" adds nothing. `spare` more windows are set apart, where the sources have them
    beyond those asked for. The source `self` needs `model` and takes seed 0 for none.

    Raises `DataError` when a source is unknown, unreadable or too short, `OptionError` for an unknown `bos`.
    """
    if bos not in BOS:
        raise OptionError(f"bos is {bos!r}, but must be {', '.join(BOS)}.")
    shortest = 2 if bos == "window" else 1
    if length < shortest:
        raise DataError(f"length is {length}, but a window needs at least {shortest} token(s); give a larger --length.")
    specs = parse_spec(spec)
    check_files(specs)
    counts = share_windows(specs, windows)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    request = _Request(length, purpose, -(-spare // len(specs)), Reading(tokenizer, generator, join, bos))
    cuts = [
        _written_windows(model, count, request) if source.kind == "self" else _cut_windows(source, count, request)
        for source, count in zip(specs, counts, strict=True)
    ]
    ids, unseen = torch.cat([cut.ids for cut in cuts]), torch.cat([cut.unseen for cut in cuts])
    recipes = tuple(cut.recipe for cut in cuts)
    recipe = DataRecipe(
        spec=spec,
        windows=ids.shape[0],
        length=length,
        seed=seed,
        join=join,
        bos=bos,
        split=",".join(part.split for part in recipes),
        tokens_hash=hash_tokens(ids),
        tokens=ids.numel(),
        documents=sum(part.documents for part in recipes),
        parts=recipes,
    )
    return Windows(ids, cuts[-1].tail, recipe, unseen[:spare])


def share_windows(specs: Sequence[SourceSpec], windows: int | None) -> list[int | None]:
    """How many windows each part gives; None is every whole one. Raises `DataError` when that cannot be said."""
    if windows is not None and windows < 1:
        raise DataError(f"windows is {windows}, but must be positive; leave it out for the whole text.")
    counts = [spec.windows for spec in specs]
    if len({count is None for count in counts}) == 2:
        bare = next(spec.name for spec in specs if spec.windows is None)
        raise DataError(f"{bare}: has no count, but other sources have; give every source a count, or none.")
    if counts[0] is not None or windows is None:
        return counts
    each, rest = divmod(windows, len(specs))
    if each == 0:
        raise DataError(f"windows is {windows}, but {len(specs)} sources were named; ask for one each at least.")
    return [each + rest, *[each] * (len(specs) - 1)]


@dataclass(frozen=True)
class _Cut:
    """What one source gives: windows `[count, length]`, `unseen` ones behind them, and the `tail` of the text."""

    ids: Tensor
    unseen: Tensor
    tail: Tensor
    recipe: SourceRecipe


def _cut_windows(spec: SourceSpec, count: int | None, request: _Request) -> _Cut:
    how, per_window = request.reading, request.per_window
    needed, spare = (None if count is None else count * per_window), request.unseen * per_window
    small = math.inf if needed is None else ample(needed, spare)
    source = open_source(spec, request.purpose, how.tokenizer, small)
    tokens = read_tokens(source, needed, spare, how)
    ids = tokens.ids
    whole = len(ids) // per_window
    if whole == 0:
        raise DataError(
            f"{spec.name}: has {len(ids)} tokens, but one window needs {per_window}; "
            "give more text or a smaller --length."
        )
    if count is not None and whole < count:
        raise DataError(
            f"{spec.name}: has {whole} windows of {request.length} tokens ({len(ids):,} tokens), but {count} were "
            "asked; give more text, fewer --windows or a smaller --length."
        )
    rows = ids[: whole * per_window].reshape(whole, per_window)
    ends = how.generator is None and tokens.ended and count in (None, whole) and how.bos != "window"
    tail = ids[whole * per_window :] if ends else ids[:0]
    if how.generator is not None:
        rows = rows[torch.randperm(whole, generator=how.generator)]
    number = whole if count is None else count
    unseen = min(request.unseen, whole - number)
    # Evenly spaced, since neighbours are alike.
    unseen_rows = [number + (2 * i + 1) * (whole - number) // (2 * unseen) for i in range(unseen)]
    rows = rows[[*range(number), *unseen_rows]]
    if how.bos == "window":
        rows = torch.cat([torch.full((len(rows), 1), bos_id(how.tokenizer)), rows], dim=1)
    recipe = SourceRecipe(
        source=label(spec),
        split=source.split,
        reading=tokens.reading,
        documents=tokens.documents,
        text_tokens=len(ids),
        windows=number,
        column=source.column,
        rendering=source.rendering,
    )
    return _Cut(rows[:number].contiguous(), rows[number:].contiguous(), tail, recipe)


def _written_windows(model: Any, count: int | None, request: _Request) -> _Cut:
    how = request.reading
    lead = lead_of(how.tokenizer, "a") if how.bos == "start" else []
    if how.bos == "window":
        lead = [bos_id(how.tokenizer)]
    ids = write_windows(model, how.tokenizer, lead, count, request.length, how.generator)
    recipe = SourceRecipe("self", "all", "written by the model", len(ids), ids.numel(), len(ids))
    return _Cut(ids, ids[:0], ids.flatten()[:0], recipe)
