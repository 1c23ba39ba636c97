"""Recipes: small named compositions of parts: grouping, factorizer, allocator, refiners. A few lines of data each.

A user's own recipe is a TOML file with the same keys (and, above the tables, `storage = "pivoted"` if it is not pairs):

    [factorizer]
    name = "svd_llm"
    damping = 1e-4

    [allocator]
    name = "uniform"

    [grouping]
    size = 2

    [experts]
    ranks = "free"

    [[refiners]]
    name = "refit_coefficients"
    min_removed = 0.3
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from eckart import registry, storages
from eckart.allocators.base import Allocator
from eckart.errors import OptionError
from eckart.factorizers.base import Factorizer
from eckart.maths.rounding import GROUP, WIDTHS
from eckart.plans.experts import Experts
from eckart.plans.grouping import Grouping
from eckart.refiners.base import Refiner
from eckart.support import reading
from eckart.support.escaping import plain
from eckart.types import Group, Packing, Target


@dataclass(frozen=True)
class Recipe:
    """Which parts, with which options. Options that are not named have the part's defaults.

    `options` maps "factorizer", "allocator", "grouping", "experts" and the name of each refiner to its options.
    `storage` is how factors are stored in the end, where a group can have it; it prices ranks for every allocator.

    `forms` are the storages of few bits that a plan may use once bits are asked for, `widths` the bits of a number;
    without them everything has 16 or 32. `bits` per weight are asked for where no goal is given; None: a share is.
    """

    name: str
    factorizer: str
    allocator: str = "uniform"
    refiners: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: str = ""
    storage: str = "pair"
    forms: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    bits: float | None = None
    group: int = GROUP

    @property
    def packing(self) -> Packing | None:
        """What a plan may use of few bits; None for one in full precision."""
        return Packing(self.forms, self.widths, self.group) if self.widths else None

    def make_factorizer(self) -> Factorizer:
        """Build the factorizer; raises `OptionError` for an unknown name or option."""
        factorizer: Factorizer = registry.make("factorizers", self.factorizer, self.options.get("factorizer"))
        return factorizer

    def make_allocator(self) -> Allocator:
        """Build the allocator; raises `OptionError` for an unknown name or option."""
        allocator: Allocator = registry.make("allocators", self.allocator, self.options.get("allocator"))
        return allocator

    def make_grouping(self) -> Grouping:
        """Build the grouping; raises `OptionError` for an unknown option."""
        return registry.build(Grouping, "grouping", self.options.get("grouping"))

    def make_experts(self) -> Experts:
        """Build the options of experts; raises `OptionError` for an unknown one."""
        return registry.build(Experts, "experts", self.options.get("experts"))

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        """Put every target into one group. Raises `OptionError` when there is nothing to group."""
        return self.make_experts().groups(targets, self.make_grouping())

    def make_refiners(self) -> list[Refiner]:
        """Build the refiners, in the order they run; raises `OptionError` for an unknown name or option."""
        return [registry.make("refiners", name, self.options.get(name)) for name in self.refiners]

    def needs_predictions(self) -> str | None:
        """The part that needs the logits of a next token, in words; None if a model without a head will do."""
        parts: list[tuple[str, str, Any]] = [("factorizer", self.factorizer, self.make_factorizer())]
        parts += [("allocator", self.allocator, self.make_allocator())]
        parts += [("refiner", name, part) for name, part in zip(self.refiners, self.make_refiners(), strict=True)]
        return next((f"the {kind} {name}" for kind, name, part in parts if part.needs_predictions), None)

    def reads_text(self) -> bool:
        """Whether a run by this recipe looks at any text."""
        allocator = self.make_allocator()
        measured = bool(allocator.wants) or allocator.probe_windows() is not None
        return bool(self.make_factorizer().needs) or measured or bool(self.refiners)

    def to_dict(self) -> dict[str, Any]:
        """Every part with every option, defaults written out."""
        few_bits = {"forms": self.forms, "widths": self.widths, "group": self.group} if self.widths else {}
        return {
            "name": self.name,
            "factorizer": describe(self.factorizer, self.make_factorizer()),
            "allocator": describe(self.allocator, self.make_allocator()),
            "grouping": registry.options_of(self.make_grouping()),
            "experts": registry.options_of(self.make_experts()),
            "refiners": [describe(n, r) for n, r in zip(self.refiners, self.make_refiners(), strict=True)],
            "storage": self.storage,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in few_bits.items()},
        }


BUILT_IN = {
    recipe.name: recipe
    for recipe in (
        Recipe("svd", "svd", about="plain truncated SVD; no data needed"),
        Recipe("fwsvd", "fwsvd", about="Fisher-weighted SVD (arXiv 2207.00112)"),
        Recipe(
            "asvd",
            "asvd",
            "sensitivity_threshold",
            about="activation-aware SVD with its rank search (arXiv 2312.05821)",
        ),
        Recipe("svd-llm", "svd_llm", about="truncation-aware whitening, SVD-LLM (W) (arXiv 2403.07378), uniform ranks"),
        Recipe(
            "rtn",
            "svd",
            forms=("packed",),
            widths=WIDTHS,
            bits=4.5,
            about="round to nearest, one width for all; no data needed",
        ),
        Recipe(
            "gptq",
            "svd_llm",
            options={"factorizer": {"damping": 0.01}},  # as GPTQ's own code has it
            forms=("packed",),
            widths=WIDTHS,
            bits=4.5,
            about="rounding with errors made up for (arXiv 2210.17323), one shot, one width for all",
        ),
        Recipe(
            "eckart",
            "two_sided",
            "water_level",
            options={"allocator": {"correction": "full"}},
            storage="pivoted",
            forms=("packed", "packed_pair", "packed_sum"),
            about="Fisher metric, one water level over the model, pivoted storage; predicts and measures its loss",
        ),
        Recipe(
            "eckart-full",
            "two_sided",
            "water_level",
            refiners=("block_collaborative", "recover"),
            options={
                "allocator": {"correction": "full"},
                "block_collaborative": {
                    "start": "found",
                    "form": "free",
                    "metric": "gradient",
                    "free_steps": 20,
                    "batch": 4,
                },
                "recover": {"epochs": 4},
            },
            storage="pivoted",
            about="eckart, then blocks refined in the residual stream's metric, then recovery; minutes more",
        ),
        Recipe(
            "lc-svd",
            "svd_llm",
            "error_search",
            refiners=("block_collaborative",),
            about="blocks compressed together, ranks searched by error (ICLR 2026 no. 6575, as reconstructed)",
        ),
        Recipe(
            "lc-svd-fixed",
            "svd_llm",
            refiners=("block_collaborative",),
            about="blocks compressed together, uniform ranks (ICLR 2026 no. 6575, as reconstructed)",
        ),
        Recipe(
            "duo-svd", "column_preserving", "knapsack", about="preserved columns, measured shares (arXiv 2510.19385 v2)"
        ),
        Recipe(
            "cpsvd",
            "column_preserving",
            "cpsvd",
            options={"factorizer": {"early_exit": False, "acceptance": 0.0}},
            about="preserved columns, shares by similarity and error (arXiv 2510.19385 v1)",
        ),
        Recipe(
            "d-rank",
            "svd_llm",
            "energy_effective_rank",
            refiners=("refit_coefficients",),
            options={"grouping": {"size": "auto"}},
            about="ranks by energy effective rank, shared bases, rebalanced attention (arXiv 2509.25622)",
        ),
        Recipe(
            "basis-sharing",
            "svd_llm",
            refiners=("refit_coefficients",),
            options={"grouping": {"size": 2}},
            about="one basis for two neighbouring layers (arXiv 2410.03765), uniform ranks",
        ),
    )
}


def find(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A built-in recipe or a TOML file, with options overridden.

    `overrides` maps `part.option` to a value: `{"factorizer.damping": 1e-4, "allocator": "uniform"}`.
    `storage` is a part without options. Raises `OptionError` for an unknown recipe, part or option.
    """
    recipe = read_file(Path(name)) if name.endswith(".toml") else BUILT_IN.get(name)
    if recipe is None:
        raise OptionError(registry.unknown("recipe", name, sorted(BUILT_IN)))
    return override(recipe, overrides or {})


def override(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe with options overridden as in `find`."""
    for key, value in overrides.items():
        recipe = _override(recipe, key, value)
    recipe.to_dict()  # builds every part, so that a wrong option is reported before any work
    return recipe


def _override(recipe: Recipe, key: str, value: Any) -> Recipe:
    part, _, option = key.partition(".")
    if key in ("storage", "allocator.storage"):  # the latter is its name up to version 0.1
        return replace(recipe, storage=checked_storage(str(value)))
    parts = [
        "factorizer",
        "allocator",
        "grouping",
        "experts",
        *(recipe.refiners if option else ["refiners", "storage"]),
    ]
    if part not in parts or key in ("grouping", "experts"):
        raise OptionError(registry.unknown("part of a recipe", part, parts))
    if key == "refiners":
        return replace(recipe, refiners=_names(value))
    if not option:  # another method for this part: its options start from their defaults
        kept = {name: options for name, options in recipe.options.items() if name != part}
        recipe = replace(recipe, options=kept)
        return replace(recipe, factorizer=str(value)) if part == "factorizer" else replace(recipe, allocator=str(value))
    return replace(recipe, options={**recipe.options, part: {**recipe.options.get(part, {}), option: value}})


def in_few_bits(recipe: Recipe, widths: str | None, bits: float | None) -> Recipe:
    """The recipe with the bits of a number that were asked for, `widths` as in "4,8"; all there are for `bits` alone.

    Raises `OptionError` for a recipe that knows no few bits, and for other widths than there are.
    """
    if widths is None and (bits is None or recipe.widths):
        return recipe
    if not recipe.forms:
        possible = ", ".join(name for name, one in BUILT_IN.items() if one.forms)
        raise OptionError(f"recipe {recipe.name} has no form of few bits; take one of {possible}, or leave bits out.")
    found = tuple(dict.fromkeys(part.strip() for part in (widths or ",".join(map(str, WIDTHS))).split(",")))
    if wrong := [part for part in found if part not in map(str, WIDTHS)]:
        raise OptionError(f"widths has {wrong[0]!r}, but must be some of {','.join(map(str, WIDTHS))}, as in 4,8.")
    return replace(recipe, widths=tuple(sorted(map(int, found))))


def checked_storage(name: str) -> str:
    """The name of a storage that a plan may ask for. Raises `OptionError` for any other."""
    possible = [storage.name for storage in storages.known() if storage.from_plain_pairs]
    if name not in possible:
        raise OptionError(registry.unknown("storage", name, possible))
    return name


def _names(value: Any) -> tuple[str, ...]:
    """Names of refiners from a comma-separated text or a sequence; "none" and "" are no refiner."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise OptionError(f"refiners is {reading.shown(value)}, but it must be names of refiners.")
    return tuple(part.strip().replace("-", "_") for part in parts if part.strip() not in ("", "none"))


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """A recipe as a file has it. The options in the tables are checked when the parts are built."""

    factorizer: dict[str, Any]
    allocator: dict[str, Any] = {}
    grouping: dict[str, Any] = {}
    experts: dict[str, Any] = {}
    refiners: list[dict[str, Any]] = []
    about: str = ""
    storage: str | None = None


def read_file(path: Path) -> Recipe:
    """A recipe from a TOML file. Raises `OptionError` when it is not one."""
    data = reading.read_toml(path, OptionError, "recipe file")
    source = plain(path, 1000)
    if "factorizer" not in data or set(data) - set(_File.__struct_fields__):
        raise OptionError(
            f"{source}: a recipe has the table [factorizer], and may have [allocator], [grouping], [experts], "
            "[[refiners]], 'storage' and 'about'."
        )
    file = reading.checked(data, _File, OptionError, source, an_object="a table")
    options = {part: getattr(file, part) for part in ("factorizer", "allocator", "grouping", "experts")}
    storage = options["allocator"].pop("storage", "pair")
    names = {part: options[part].pop("name", "uniform") for part in ("factorizer", "allocator")}
    for what, name in {**names, "storage": storage}.items():
        if not isinstance(name, str):
            raise OptionError(f"{source}: the name of its {what} is {reading.shown(name)}, but it must be text.")
    order = _refiners(file.refiners, source)
    options |= dict(zip(order, file.refiners, strict=True))
    storage = checked_storage(storage if file.storage is None else file.storage)
    return Recipe(path.stem, names["factorizer"], names["allocator"], order, options, file.about, storage)


def _refiners(tables: list[dict[str, Any]], source: str) -> tuple[str, ...]:
    """The names in the tables of refiners, taken out of them."""
    order = _names([table.pop("name", "") for table in tables])
    if len(order) != len(tables):
        raise OptionError(f"{source}: each [[refiners]] table needs a name.")
    if len(set(order)) < len(order):
        raise OptionError(f"{source}: a refiner is there twice, but its options can be given once; name each once.")
    return order


def describe(name: str, method: Factorizer | Allocator | Refiner) -> dict[str, Any]:
    """A part with all its options, for plans and provenance."""
    return {"name": name, **registry.options_of(method)}
