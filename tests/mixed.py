"""Tiny models of many families in which every storage form stands beside the others."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from eckart.model.discovery import discover
from eckart.model.factorise import factorize_, store_
from eckart.portable.linear import share_basis_, weight_view
from eckart.testing import tiny_model, tiny_models

_SMALL: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, Callable[[], Any]] = {
    **tiny_models(),
    "qwen2": lambda: tiny_model("Qwen2", **_SMALL),
    "gemma2": lambda: tiny_model("Gemma2", **_SMALL, head_dim=8),
    "mixtral": lambda: tiny_model("Mixtral", **_SMALL, num_local_experts=4),
    "qwen3-moe": lambda: tiny_model("Qwen3Moe", **_SMALL, **_EXPERTS, head_dim=8),
}
FORMS = ("shared", "rows", "kept", "columns")


def mixed(family: str) -> Any:
    """A tiny model of a family in every storage form."""
    return mix(FAMILIES[family]())


def mix(model: Any) -> Any:
    """Factorise the targets of a model, in turn: a shared basis, pivoted rows, kept and pivoted columns."""
    for (first, *others), form in zip(_kinds(model), FORMS * 9, strict=False):
        for name in (first, *others):
            _factorize_(model, name, 3 if form == "kept" else 0)
            if form in ("rows", "columns"):
                store_(model, name, "pivoted", pivots=form)
        if form == "shared":
            for name in others:
                share_basis_(model.get_submodule(first), model.get_submodule(name))
    return model


def _kinds(model: Any) -> Iterator[list[str]]:
    """Names of the targets, those of one kind in all blocks together."""
    kinds: dict[str, list[str]] = {}
    for target in discover(model, exclude=["*.experts.*"]).targets:  # of which test_expert_checkpoints.py has all
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", target.name), []).append(target.name)
    yield from kinds.values()


def _factorize_(model: Any, name: str, kept: int) -> None:
    """Cut the SVD of the weight, without its first `kept` odd columns, at half rank."""
    weight = weight_view(model.get_submodule(name))
    kept_index = torch.arange(kept) * 2 + 1
    rest = [i for i in range(weight.shape[1]) if i not in kept_index.tolist()]
    u, s, vt = torch.linalg.svd(weight[:, rest].double(), full_matrices=False)
    rank = len(s) // 2
    strip = (kept_index, weight[:, kept_index]) if kept else (None, None)
    factorize_(model, name, vt[:rank], u[:, :rank] * s[:rank], *strip)
