"""What makes the windows of a text again, as plain data that is stored beside results and checkpoints."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SourceRecipe:
    """What one source gave: `documents` texts were read, `text_tokens` tokens in all.

    `reading` says which part of the source that was: `whole`, `first rows`, `drawn rows`, `first N characters`,
    `drawn pieces of N characters` or `written by the model`. `column` is that of a table; empty for a plain text.
    `rendering` says how its values became text: `text` as they are, `chat template`, or `roles and text`.
    """

    source: str
    split: str
    reading: str
    documents: int
    text_tokens: int
    windows: int
    column: str = ""
    rendering: str = "text"


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


def hash_tokens(ids: Tensor) -> str:
    """SHA-256 in hex of the shape and the ids as little-endian int64."""
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()
