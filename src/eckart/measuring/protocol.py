"""The protocol of a measurement: everything that has to be the same for two perplexities to mean the same.

The protocol of the field (GPTQ, SVD-LLM, Basis Sharing): the test text joined and tokenised once,
non-overlapping windows of 2048 tokens, the tail dropped, `length - 1` predictions in each window,
`exp` of the mean negative log-likelihood over all predicted tokens. `mean="window"` is D-Rank's: the
tail is kept as a shorter window and the mean is taken over the windows' means.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from eckart.errors import OptionError
from eckart.text.data import Windows, load_windows

Mean = Literal["token", "window"]


class ProtocolOptions(TypedDict, total=False):
    """The fields of `Protocol`, for functions that take them as keywords."""

    windows: int | None
    length: int
    seed: int | None
    join: str
    bos: str
    mean: Mean
    device: str
    dtype: str


@dataclass(frozen=True)
class Protocol:
    """How text is measured on: `windows` of it (None: all) of `length` tokens, each once, and how they are made.

    `seed`, `join` and `bos` are those of `load_windows`; `dtype` is the one computed in ("auto": the checkpoint's,
    float32 for half precision on a CPU). Raises `OptionError` for an unknown `mean`.
    """

    windows: int | None = None
    length: int = 2048
    seed: int | None = None
    join: str = "\n\n"
    bos: str = "start"
    mean: Mean = "token"
    device: str = "cpu"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.mean not in ("token", "window"):
            raise OptionError(f"mean is {self.mean!r}, but must be 'token' or 'window'.")

    @property
    def stride(self) -> int:
        """From the start of one window to that of the next: no token is predicted twice."""
        return self.length

    def corpus(self, spec: str, tokenizer: Any) -> Windows:
        """The windows of a text to measure on. Raises what `load_windows` raises."""
        options: dict[str, Any] = {"windows": self.windows, "length": self.length, "seed": self.seed}
        return load_windows(spec, tokenizer, purpose="evaluation", join=self.join, bos=self.bos, **options)

    def to_dict(self, computed_in: str) -> dict[str, Any]:
        """What a stored result says of it besides the recipe of the text; `computed_in` is the dtype's name."""
        return {"mean": self.mean, "stride": self.stride, "dtype": computed_in, "device": self.device}
