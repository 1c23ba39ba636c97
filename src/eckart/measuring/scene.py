"""What an allocator may see beside spectra: measured once, before any plan, by a module of this package.

An allocator names what it wants (`Allocator.wants`). A name is that of a file here, whose `observe(scene, allocator)`
measures and returns `{group name: value}`; a name with a colon, `module:function`, is a function of your own. The
values come with the spectra, in `Spectrum.observed`.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.errors import OptionError
from eckart.measuring.probes import Cut
from eckart.model.discovery import Layout
from eckart.progress import Progress, silent
from eckart.types import Group, Spectrum


@dataclass(frozen=True)
class Scene:
    """What there is to observe: the dense model, which is left as it was, and its groups, decomposed.

    `cut` makes the layers of a group at a rank. `windows` is `[windows, length]` token ids of the calibration; `keep`
    is the share near which plans will be and `storage` prices their ranks; `work` holds journals and
    `depends` says what decides the cuts.
    """

    model: nn.Module
    layout: Layout
    groups: Sequence[Group]
    cut: Cut
    windows: Tensor
    keep: float
    storage: str
    work: Path
    depends: Mapping[str, Any]
    progress: Progress = silent


def observe(scene: Scene, spectra: Sequence[Spectrum], allocator: Any) -> list[Spectrum]:
    """The spectra, with all that the allocator wants. Raises `OptionError` for a name that nothing measures."""
    for name in allocator.wants:
        module, _, function = name.partition(":") if ":" in name else (f"eckart.measuring.{name}", ":", "observe")
        try:
            values = getattr(importlib.import_module(module), function)(scene, allocator)
        except (ImportError, AttributeError) as error:
            raise OptionError(f"{type(allocator).__name__} wants {name!r}, which nothing measures: {error}.") from None
        spectra = [replace(s, observed={**s.observed, name: values[s.group.name]}) for s in spectra]
    return list(spectra)
