"""How far the model's output moves when one group alone is cut, all others dense (ASVD, arXiv 2312.05821, sec. 3.3)."""

from collections.abc import Mapping
from typing import Any

from eckart.measuring.scene import Scene
from eckart.measuring.sensitivity import curves_of


def observe(scene: Scene, allocator: Any) -> Mapping[str, Mapping[float, float]]:
    """KL from the dense model at the shares `allocator.shares` and at 1, in nats per token, for each group."""
    return curves_of(scene, allocator, 1.0, allocator.shares)
