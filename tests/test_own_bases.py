"""Shared bases can be given to each layer, for trainers that shard blocks apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import eckart
from eckart.checkpoints import checkpoint
from eckart.portable import hf

Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))


def test_each_its_own_and_the_model_is_the_same(make: Callable[..., Any], ids: torch.Tensor, tmp_path: Path) -> None:
    checkpoint.save(make("llama", shared_basis=True), tmp_path / "shared")
    model = eckart.load(tmp_path / "shared")
    before = model(ids).logits
    assert eckart.own_bases_(model) == 1
    assert not [name for name, spec in hf.specs_of(model).items() if "basis_of" in spec]
    assert torch.equal(model(ids).logits, before)
    own, other = (model.get_submodule(name).basis.weight for name in (Q1, Q0))
    own.data.add_(1)
    assert not torch.equal(own, other)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(eckart.load(tmp_path / "own")(ids).logits, model(ids).logits)


def test_nothing_to_do(make: Callable[..., Any]) -> None:
    assert eckart.own_bases_(make("llama")) == 0
