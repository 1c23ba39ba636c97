"""Which text is calibrated on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """Which text is calibrated on, and how it becomes windows of tokens (`eckart.text.data`).

    The defaults are those of the papers: 256 windows of 2048 tokens of WikiText-2.
    """

    data: str = "wikitext2"
    windows: int = 256
    length: int = 2048
    seed: int | None = None
    join: str = "\n\n"
    bos: str = "start"
