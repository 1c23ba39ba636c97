"""A source is read as far as it is needed, and tokenised once."""

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.errors import DataError
from eckart.support.escaping import plain
from eckart.text.sources import Source

AMPLE = 32  # characters read per token needed; a token of prose is 4 to 5 of them
SMALL = 1 << 21  # a text of fewer characters is read whole, however little is needed
FURTHER = 8  # times as many characters where those held too few tokens
EDGE = 64  # tokens dropped where a text was cut: the last ones would be others if it went on


@dataclass(frozen=True)
class Reading:
    """How sources are read: what every one of them is tokenised with, drawn by and joined by."""

    tokenizer: Any
    generator: torch.Generator | None
    join: str
    bos: str


@dataclass(frozen=True)
class Tokens:
    """Token ids `[tokens]` of `documents` texts; `ended` says that nothing stands behind them in the source."""

    ids: Tensor
    documents: int
    reading: str
    ended: bool


def ample(needed: int, spare: int) -> int:
    """Characters of one text that surely hold the tokens needed, and those spare."""
    return max(AMPLE * (needed + spare), SMALL)


def read_tokens(source: Source, needed: int | None, spare: int, how: Reading) -> Tokens:
    """At least `needed` tokens of a source if it has them; None is all. Raises `DataError` for a blank source."""
    whole = needed is None or (source.layout == "one text" and how.generator is not None)
    generator = None if whole else how.generator
    in_order = source.layout != "rows" and generator is None  # then a part is the beginning of the whole
    joined = source.layout == "pieces" and in_order
    enough = _enough(source.layout, None if whole else needed, spare)
    texts: list[str] = []
    with closing(source.texts(generator)) as stream:
        while True:
            ended = _take(stream, texts, enough)
            text = ("" if joined else how.join).join(texts)
            if ended or text.strip():
                ids = tokenise(source.name, text, how)
                ids = ids[: len(ids) - EDGE] if in_order and not ended else ids
                if ended or len(ids) >= (needed or 0):
                    break
            enough *= FURTHER  # blank or repetitive text, with more than AMPLE characters a token
    said = "whole" if whole or (in_order and ended) else _said(source.layout, how.generator is not None, text)
    return Tokens(ids, 1 if joined else len(texts), said, ended)


def _enough(layout: str, needed: int | None, spare: int) -> float:
    """Characters to read at first; None needed is all of them."""
    if needed is None:
        return math.inf
    return AMPLE * needed if layout == "rows" else ample(needed, spare)


def _take(stream: Generator[str, None, None], texts: list[str], enough: float) -> bool:
    """Add texts until they hold `enough` characters; whether the source ended before."""
    characters = sum(map(len, texts))
    while characters < enough:
        text = next(stream, None)
        if text is None:
            return True
        texts.append(text)
        characters += len(text)
    return False


def _said(layout: str, drawn: bool, text: str) -> str:
    """What was read of a source that was not read whole."""
    if layout == "rows":
        return "drawn rows" if drawn else "first rows"
    return f"{'drawn pieces of' if drawn else 'first'} {len(text):,} characters"


def tokenise(name: str, text: str, how: Reading) -> Tensor:
    """Token ids `[tokens]`, led by what the tokenizer puts before a text when `bos` is "start"."""
    if not text.strip():
        raise DataError(f"{name}: is empty; give a text.")
    ids = _encode(how.tokenizer, text, special=False)
    lead = lead_of(how.tokenizer, text[:1000]) if how.bos == "start" else []
    if ids[: len(lead)] == lead:  # the text brings them itself, as chats may
        lead = []
    return torch.tensor(lead + ids, dtype=torch.int64)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose=False: a whole corpus is longer than the model's positions on purpose, so no warning about that
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except Exception as error:  # what its library raises, which has no errors of its own
        name = type(tokenizer).__name__
        raise DataError(
            f"the tokenizer ({name}) fails on the text: {plain(error)}; its files may be damaged."
        ) from None
    return ids


def lead_of(tokenizer: Any, text: str) -> list[int]:
    """The special tokens that the tokenizer puts before a text; those it puts after it are left out."""
    bare, full = _encode(tokenizer, text, special=False), _encode(tokenizer, text, special=True)
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def bos_id(tokenizer: Any) -> int:
    """Raises `DataError` for a tokenizer without a BOS token."""
    if tokenizer.bos_token_id is None:
        raise DataError("bos is 'window', but the tokenizer has no BOS token; use bos 'start' or 'none'.")
    return int(tokenizer.bos_token_id)
