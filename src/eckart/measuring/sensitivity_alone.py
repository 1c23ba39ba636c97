"""How far the model's output moves when one group alone is cut, all others dense (ASVD, arXiv 2312.05821, sec. 3.3)."""

from collections.abc import Mapping
from typing import Any

from eckart.measuring.scene import Scene
from eckart.measuring.sensitivity import measure_curves


def observe(scene: Scene, allocator: Any) -> Mapping[str, Mapping[float, float]]:
    """The KL divergence from the dense model at the shares `allocator.shares` and at 1, nats per token, for each group.

    Measured on the first `allocator.windows` windows of the calibration, cut to `allocator.length` tokens.
    """
    curves = measure_curves(
        scene.model,
        scene.layout,
        scene.groups,
        scene.cut,
        scene.windows[: allocator.windows, : allocator.length],
        1.0,
        work=scene.work,
        depends=scene.depends,
        shares=allocator.shares,
        storage=scene.storage,
        progress=scene.progress,
    )
    return curves.losses
