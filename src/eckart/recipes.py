"""Recipes: small named compositions of a factorizer and an allocator. A few lines of data each.

A user's own recipe is a TOML file with the same keys:

    [factorizer]
    name = "svd_llm"
    damping = 1e-4

    [allocator]
    name = "uniform"
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from eckart import registry
from eckart.allocators.base import Allocator
from eckart.errors import OptionError
from eckart.factorizers.base import Factorizer


@dataclass(frozen=True)
class Recipe:
    """Which parts, with which options. Options that are not named have the part's defaults."""

    name: str
    factorizer: str
    allocator: str = "uniform"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: str = ""

    def make_factorizer(self) -> Factorizer:
        """Build the factorizer; raises `OptionError` for an unknown name or option."""
        factorizer: Factorizer = registry.make("factorizers", self.factorizer, self.options.get("factorizer"))
        return factorizer

    def make_allocator(self) -> Allocator:
        """Build the allocator; raises `OptionError` for an unknown name or option."""
        allocator: Allocator = registry.make("allocators", self.allocator, self.options.get("allocator"))
        return allocator

    def to_dict(self) -> dict[str, Any]:
        """Every part with every option, defaults written out."""
        return {
            "name": self.name,
            "factorizer": describe(self.factorizer, self.make_factorizer()),
            "allocator": describe(self.allocator, self.make_allocator()),
        }


BUILT_IN = {
    recipe.name: recipe
    for recipe in (
        Recipe("svd", "svd", about="plain truncated SVD; no data needed"),
        Recipe("fwsvd", "fwsvd", about="Fisher-weighted SVD (arXiv 2207.00112)"),
        Recipe("asvd", "asvd", about="activation-aware SVD (arXiv 2312.05821), uniform ranks"),
        Recipe("svd-llm", "svd_llm", about="truncation-aware whitening (arXiv 2403.07378), uniform ranks"),
    )
}


def find(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A built-in recipe or a TOML file, with options overridden.

    `overrides` maps `part.option` to a value: `{"factorizer.damping": 1e-4, "allocator": "uniform"}`.
    Raises `OptionError` for an unknown recipe, part or option.
    """
    recipe = read_file(Path(name)) if name.endswith(".toml") else BUILT_IN.get(name)
    if recipe is None:
        raise OptionError(registry.unknown("recipe", name, sorted(BUILT_IN)))
    for key, value in (overrides or {}).items():
        recipe = _override(recipe, key, value)
    recipe.to_dict()  # builds every part, so that a wrong option is reported before any work
    return recipe


def _override(recipe: Recipe, key: str, value: Any) -> Recipe:
    part, _, option = key.partition(".")
    if part not in ("factorizer", "allocator"):
        raise OptionError(registry.unknown("part of a recipe", part, ["factorizer", "allocator"]))
    if not option:  # another method for this part: its options start from their defaults
        kept = {name: options for name, options in recipe.options.items() if name != part}
        return replace(recipe, **{part: str(value)}, options=kept)
    return replace(recipe, options={**recipe.options, part: {**recipe.options.get(part, {}), option: value}})


def read_file(path: Path) -> Recipe:
    """A recipe from a TOML file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(f"{path}: no such recipe file.") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path}: cannot be read as a recipe: {error}.") from None
    if "factorizer" not in data or set(data) - {"factorizer", "allocator", "about"}:
        raise OptionError(f"{path}: a recipe has the tables [factorizer] and [allocator], and may have 'about'.")
    parts = {part: dict(data.get(part, {})) for part in ("factorizer", "allocator")}
    names = {part: str(options.pop("name", "uniform")) for part, options in parts.items()}
    return Recipe(path.stem, names["factorizer"], names["allocator"], parts, str(data.get("about", "")))


def describe(name: str, method: Factorizer | Allocator) -> dict[str, Any]:
    """A part with all its options, for plans and provenance."""
    return {"name": name, **asdict(method)}
