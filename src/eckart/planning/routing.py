"""How many tokens of the calibration the experts saw, in words."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eckart.model.discovery import Layout
from eckart.types import Target

FEW = 4  # times the width of an expert: fewer tokens than that say little of its inputs


@dataclass(frozen=True)
class Routing:
    """`tokens[name]` were routed to an expert, of as many as there are."""

    tokens: Mapping[str, int]

    @staticmethod
    def of(targets: Sequence[Target], tokens: Mapping[str, int]) -> "Routing | None":
        """Of the experts among the targets; None if there are none, or nothing was counted."""
        experts = {t.name: tokens[t.name] for t in targets if t.expert is not None and t.name in tokens}
        return Routing(experts) if experts else None

    @property
    def rarest(self) -> str:
        return min(self.tokens, key=self.tokens.__getitem__)

    @property
    def unreached(self) -> list[str]:
        return [name for name, count in self.tokens.items() if count == 0]

    def message(self, layout: Layout) -> tuple[int, str]:
        """The level and the line for the log: a warning where the rarest expert saw few tokens for its width."""
        width = max(t.in_features for t in layout.targets if t.name in self.tokens)
        count = self.tokens[self.rarest]
        line = f"the rarest expert, {self.rarest}, saw {count} tokens"
        if self.unreached:
            line += f"; {len(self.unreached)} saw none and are cut by what the others of their layer saw"
        if count >= FEW * width:
            return logging.INFO, line
        return logging.WARNING, f"{line}; calibrate on more text: {FEW} times its width is {FEW * width}"

    def to_dict(self) -> dict[str, object]:
        return {"rarest": self.rarest, "tokens": self.tokens[self.rarest], "unreached": self.unreached}
