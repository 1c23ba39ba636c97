"""What is timed: a model that takes a prompt and then one token after the other, in torch or ONNX Runtime."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from eckart.checkpoints import checkpoint
from eckart.engines.onnx_model import GRAPH, OnnxModel
from eckart.model import kv_cache
from eckart.support import dtypes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Subject(Protocol):
    """One model on one engine; `state` is its cache, opaque to the caller."""

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Run the prompt `[batch, tokens]`; the most likely next token `[batch, 1]`, and the cache."""
        ...

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Run one more token `[batch, 1]` of every sequence."""
        ...


class TorchSubject:
    """A transformers model, called as its `generate` would: logits of the last position only, where it can."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model.eval()
        self.cache_name = kv_cache.keyword(model)
        takes = inspect.signature(model.forward).parameters
        self.only_last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        out = self.model(input_ids=ids, use_cache=True, **self.only_last)
        return out.logits[:, -1].argmax(-1, keepdim=True), kv_cache.of(out)

    @torch.inference_mode()
    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = self.model(input_ids=token, use_cache=True, **{self.cache_name: state}, **self.only_last)
        return out.logits[:, -1].argmax(-1, keepdim=True), kv_cache.of(out)


class OnnxSubject:
    """A folder of `eckart export --to onnx`; its graph computes the logits of every position."""

    def __init__(self, folder: str | Path, threads: int | None) -> None:
        self.model = OnnxModel(folder, threads)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        return self._next(*self.model(ids.numpy()))

    def step(self, token: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._next(*self.model(token.numpy(), state))

    def _next(self, logits: Any, past: Any) -> tuple[Tensor, Any]:
        return torch.from_numpy(logits[:, -1].argmax(-1))[:, None], past


def load(model: str, dtype: str, device: str, threads: int | None) -> Subject:
    """The subject for a model's name, or for the folder of an ONNX export."""
    if (Path(model) / GRAPH).is_file():
        return OnnxSubject(model, threads)
    loaded = checkpoint.load_model(model, device=device)
    dtypes.compute_in_(loaded, dtype)
    return TorchSubject(loaded)


def prompt_ids(vocabulary: int, batch: int, tokens: int, device: str = "cpu") -> Tensor:
    """Random ids `[batch, tokens]`, the same every time: what the tokens are does not change the work."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(device)
