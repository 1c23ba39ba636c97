"""Text becomes windows: a `--data` spec and a tokenizer give `[windows, length]` token ids with their recipe.

A spec is one source, or several with commas; `:N` at its end asks for N windows (`wikitext2:64,notes.txt:16`).

    wikitext2, ptb, c4            corpora of the hub, as the papers use them
    name:config:split:column      any corpus of the hub, or a folder; every field but the name may be empty
    notes.txt                     one text
    rows.jsonl[:column]           one text a row; .json (a list) and .parquet as well
    python-docs[:half]            the language reference inside Python; half is first, second or all
    self                          text that the model itself writes

The texts of a source are joined and tokenised once, then cut into windows that do not overlap; the tail is
dropped. Without a seed they come from the start; a seed draws them at random, each at most once.

Rows of c4, of unnamed hub corpora and of tables are texts apart, so no more of them are read than needed: up to
`AMPLE` characters for each token asked for. A seed then draws the rows as well. The recipe says so (`reading`).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.errors import DataError, OptionError
from eckart.text import sources
from eckart.text.self_text import write_windows
from eckart.text.sources import Purpose, Source, SourceSpec, parse_spec

BOS = ("none", "start", "window")
AMPLE = 32  # characters read per token needed; a token of prose is 4 to 5 of them


@dataclass(frozen=True)
class SourceRecipe:
    """What one source gave: `documents` texts were read, `text_tokens` tokens in all."""

    source: str
    split: str
    reading: str  # whole, first rows, drawn rows, or written by the model
    documents: int
    text_tokens: int
    windows: int


@dataclass(frozen=True)
class DataRecipe:
    """Everything that makes the windows again. `tokens` is windows x length; the hash is `hash_tokens`."""

    spec: str
    windows: int
    length: int
    seed: int | None
    join: str
    bos: str
    split: str
    tokens_hash: str
    tokens: int
    documents: int
    parts: tuple[SourceRecipe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON takes and gives back unchanged."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}


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
    tokenizer: Any
    length: int
    generator: torch.Generator | None
    purpose: Purpose
    join: str
    bos: str
    unseen: int


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
    counts = share_windows(specs, windows)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    request = _Request(tokenizer, length, generator, purpose, join, bos, -(-spare // len(specs)))
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


def hash_tokens(ids: Tensor) -> str:
    """SHA-256 in hex of the shape and the ids as little-endian int64."""
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()


def check_length(windows: Windows, model: Any) -> None:
    """Raise `DataError` when the windows are longer than the positions that the model knows."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < windows.recipe.length:
        raise DataError(
            f"windows have {windows.recipe.length} tokens, but the model knows {limit} positions; "
            f"give --length {limit} or less."
        )


@dataclass(frozen=True)
class _Cut:
    """What one source gives: windows `[count, length]`, `unseen` ones behind them, and the `tail` of the text."""

    ids: Tensor
    unseen: Tensor
    tail: Tensor
    recipe: SourceRecipe


def _cut_windows(spec: SourceSpec, count: int | None, request: _Request) -> _Cut:
    source = sources.read(spec, request.purpose)
    per_window = request.length - (request.bos == "window")
    needed = None if count is None else count * per_window
    ids, documents, reading = _tokens(source, spec.name, needed, request)
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
    ends = request.generator is None and count in (None, whole) and request.bos != "window"
    tail = ids[whole * per_window :] if ends else ids[:0]
    if request.generator is not None:
        rows = rows[torch.randperm(whole, generator=request.generator)]
    number = whole if count is None else count
    unseen = min(request.unseen, whole - number)
    # Evenly spaced, since neighbours are alike.
    unseen_rows = [number + (2 * i + 1) * (whole - number) // (2 * unseen) for i in range(unseen)]
    rows = rows[[*range(number), *unseen_rows]]
    if request.bos == "window":
        rows = torch.cat([torch.full((len(rows), 1), _bos_id(request.tokenizer)), rows], dim=1)
    recipe = SourceRecipe(sources.label(spec), source.split, reading, documents, len(ids), number)
    return _Cut(rows[:number].contiguous(), rows[number:].contiguous(), tail, recipe)


def _tokens(source: Source, name: str, needed: int | None, request: _Request) -> tuple[Tensor, int, str]:
    """Token ids `[tokens]` of the joined texts, the number of texts, and which of the source they are."""
    if needed is None or not source.rows_apart:
        texts = [text for text in source.documents if text is not None]
        return _tokenise(name, texts, request), len(texts), "whole"
    order: Sequence[int] = range(len(source.documents))
    if request.generator is not None:
        order = torch.randperm(len(order), generator=request.generator).tolist()
    texts = _take(source.documents, order, AMPLE * needed)
    ids = _tokenise(name, texts, request)
    if len(ids) < needed:  # rare: blank or repetitive text, with more than AMPLE characters a token
        texts = _take(source.documents, order, None)
        ids = _tokenise(name, texts, request)
    return ids, len(texts), "first rows" if request.generator is None else "drawn rows"


def _take(documents: Sequence[str | None], order: Sequence[int], enough: int | None) -> list[str]:
    """Texts in this order until they hold `enough` characters; rows without a text are passed over."""
    texts: list[str] = []
    characters = 0
    for index in order:
        if enough is not None and characters >= enough:
            break
        if (text := documents[index]) is not None:
            texts.append(text)
            characters += len(text)
    return texts


def _tokenise(name: str, texts: Sequence[str], request: _Request) -> Tensor:
    """Token ids `[tokens]`, led by what the tokenizer puts before a text when `bos` is "start"."""
    text = request.join.join(texts)
    if not text.strip():
        raise DataError(f"{name}: is empty; give a text.")
    lead = _lead(request.tokenizer, text[:1000]) if request.bos == "start" else []
    return torch.tensor(lead + _encode(request.tokenizer, text, special=False), dtype=torch.int64)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose=False: a whole corpus is longer than the model's positions on purpose, so no warning about that
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _lead(tokenizer: Any, text: str) -> list[int]:
    """The special tokens that the tokenizer puts before a text; those it puts after it are left out."""
    bare, full = _encode(tokenizer, text, special=False), _encode(tokenizer, text, special=True)
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError("bos is 'window', but the tokenizer has no BOS token; use bos 'start' or 'none'.")
    return int(tokenizer.bos_token_id)


def _written_windows(model: Any, count: int | None, request: _Request) -> _Cut:
    if request.bos == "window":
        lead = [_bos_id(request.tokenizer)]
    else:
        lead = _lead(request.tokenizer, "a") if request.bos == "start" else []
    ids = write_windows(model, request.tokenizer, lead, count, request.length, request.generator)
    recipe = SourceRecipe("self", "all", "written by the model", len(ids), ids.numel(), len(ids))
    return _Cut(ids, ids[:0], ids.flatten()[:0], recipe)
