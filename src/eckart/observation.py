"""What some allocators see beside spectra: measured curves of the modules, similarities of the blocks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.allocators.base import Allocator
from eckart.discovery import Layout
from eckart.factorizers.base import GroupDecomposition
from eckart.progress import Progress, silent
from eckart.sensitivity import measure_curves
from eckart.similarity import block_similarities
from eckart.types import Spectrum

Tensor = torch.Tensor


def needs_windows(allocator: Allocator) -> bool:
    """True if the allocator asks for anything that has to be run on text."""
    return allocator.wants_curves or allocator.wants_similarity


def observe(
    model: nn.Module,
    layout: Layout,
    decompositions: Mapping[str, GroupDecomposition],
    allocator: Allocator,
    windows: Tensor,
    keep: float,
    *,
    work: Path,
    depends: Mapping[str, Any],
    progress: Progress = silent,
) -> list[Spectrum]:
    """The spectra, with what the allocator asks for. The model must be the dense one; it is left as it was.

    `windows` is `[windows, length]` token ids of the calibration; `work` holds the journals and
    `depends` says what decides the decompositions (`eckart.sensitivity`).
    """
    spectra = [decomposition.spectrum for decomposition in decompositions.values()]
    if allocator.wants_similarity:
        near = block_similarities(model, layout, windows, progress=progress)
        spectra = [replace(s, similarity=near[s.group.targets[0].block]) for s in spectra]
    if allocator.wants_curves:
        asked: Any = allocator  # `probed`, `windows` and `length` go with `wants_curves`
        part = windows[: asked.windows, : asked.length]
        curves = measure_curves(
            model,
            layout,
            decompositions,
            part,
            keep,
            work=work,
            depends=depends,
            shares=asked.probed,
            progress=progress,
        )
        spectra = [replace(s, measured=curves.losses[s.group.name]) for s in spectra]
    return spectra
