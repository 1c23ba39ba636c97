"""What would be compressed, and with what: `inspect` a model, list the `methods`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eckart import recipes, registry, storages
from eckart.checkpoints import checkpoint
from eckart.model.discovery import Layout, discover

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def inspect(
    model: "str | PreTrainedModel",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Layout:
    """Targets by block and kind, and everything skipped with its reason.

    `model` is a hub id, a folder, or a model in memory. Of a name only the configuration is read: the
    model is built without memory for its weights. Raises `ModelError` when there is nothing to compress.
    """
    if isinstance(model, str):
        return discover(checkpoint.skeleton(model, trust_remote_code=trust_remote_code), include, exclude)
    return discover(model, include, exclude)


def methods() -> dict[str, dict[str, Any]]:
    """Recipes with their parts, every factorizer, allocator and refiner with its options and defaults, and storages."""
    catalogue: dict[str, dict[str, Any]] = {
        kind: {name: registry.options(kind, name) for name in registry.names(kind)} for kind in registry.KINDS
    }
    catalogue["storages"] = {name: {} for name in storages.names()}
    catalogue["recipes"] = {name: {"about": r.about, **r.to_dict()} for name, r in recipes.BUILT_IN.items()}
    return catalogue
