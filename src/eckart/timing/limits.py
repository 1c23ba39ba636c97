"""How much faster a compressed model could be, and why it is not.

Two limits, each a ratio of dense to compressed:

- prefill: multiply-adds of one forward pass over the prompt, with the head for the positions whose logits
  are computed and with attention, as torch's own FLOP counter counts them. Many tokens share
  every weight that is read, so arithmetic decides.
- decode: bytes read for one token of every sequence: every weight once (of an embedding that is not also the
  head only the rows in use, counted as nothing), index arrays, and the cache at its middle length.
  At small batches reading decides; at large ones arithmetic does too, and its ratio is nearly the same.

Neither knows of the fixed cost of a product, so both are above what can be reached. Nor do they know of what
is no product at all (norms, activations, rotations, the moving of the cache), which takes the same time in both
models: `with_rest` says what is left of a limit when that part stays as it is (Amdahl's law).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.profiler import profile
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eckart import storages
from eckart.checkpoints.checkpoint import layer_specs
from eckart.model import kv_cache
from eckart.portable import hf
from eckart.portable.experts import PivotedStack
from eckart.portable.linear import is_factorized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Parts of the names of what computes products, on a CPU and in CUDA kernels.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "_attention", "gemm", "gemv", "flash", "fmha")


@dataclass(frozen=True)
class Cost:
    """What it takes to run one model.

    `macs` are the multiply-adds of a prompt (one sequence), `weight_bytes` the bytes of weights read at each step,
    `head_bytes` the part of these that is the output embedding, `cache_bytes` those of one token of one sequence.
    """

    macs: int
    weight_bytes: int
    head_bytes: int
    cache_bytes: int

    def decode_bytes(self, batch: int, length: int) -> int:
        """Bytes read for one token of each of `batch` sequences that are `length` tokens long."""
        return self.weight_bytes + batch * length * self.cache_bytes


def count(model: "PreTrainedModel", prompt: int, *, only_last: bool, weight_itemsize: int | None = None) -> Cost:
    """Count by running the prompt once. `weight_itemsize` 1 for a graph with 8-bit weights, None as stored.

    `only_last`: the head runs for the last position only, as in `generate`.
    """
    ids = torch.zeros((1, prompt), dtype=torch.long, device=model.device)
    options = {"logits_to_keep": 1} if only_last else {}
    # The counter does not know the CPU's fused attention; as plain products it does.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cache = kv_cache.of(model(input_ids=ids, use_cache=True, **options))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head is not None and head.weight.data_ptr() == table.weight.data_ptr()
    unread = set() if shared else {id(table.weight)}
    weights = sum(_size(p, weight_itemsize) for p in model.parameters() if id(p) not in unread)
    indices = sum(
        b.nbytes
        for m in model.modules()
        if is_factorized(m) or isinstance(m, PivotedStack)
        for b in m.buffers(recurse=False)
    )
    cached = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) // prompt
    return Cost(
        macs=counter.get_total_flops() // 2,
        weight_bytes=weights + indices,
        head_bytes=0 if head is None else _size(head.weight, weight_itemsize),
        cache_bytes=cached,
    )


def _size(tensor: torch.Tensor, itemsize: int | None) -> int:
    return tensor.numel() * (itemsize or tensor.element_size())


def product_share(run: Callable[[], object], device: str) -> float:
    """Share of the time of `run` that torch's profiler finds in matrix products and attention."""
    on_gpu = device.startswith("cuda")
    # Its own events are enough on a CPU; the tracer that a GPU needs writes to standard error.
    with profile(use_kineto=on_gpu, use_device="cuda" if on_gpu else None) as profiler:
        run()
    of_products = of_all = 0.0
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        of_all += spent
        if any(part in event.key for part in PRODUCTS):
            of_products += spent
    return of_products / of_all


def with_rest(limit: float, share: float) -> float:
    """The limit of a run of which only the part `share` gets faster (Amdahl's law)."""
    return 1 / (1 - share + share / limit)


def tile(device: str, dtype: str) -> int:
    """The multiple of a rank that the matrix unit likes: a vector register's lanes on a CPU, a tile on a GPU."""
    return 64 if device.startswith("cuda") else {"float32": 16, "bfloat16": 32, "float16": 32}.get(dtype, 32)


def reasons(model: "PreTrainedModel", cost: Cost, device: str, dtype: str) -> list[str]:
    """What holds the model back, in words, from its structure alone."""
    specs = hf.specs_of(model)
    if not specs:
        return ["No layer is factorised, so nothing can be faster."]
    multiple = tile(device, dtype)
    layers = layer_specs(specs)
    odd = sum(spec.get("rank", 0) % multiple != 0 for spec in layers.values())
    packed = sum(storages.find(spec["storage"]).packs for spec in layers.values())
    gathers = sum(storages.find(spec["storage"]).reorders for spec in layers.values())
    sentences = [
        f"{len(specs)} layers run two products where the dense model runs one; with few tokens each has a cost of "
        f"its own, whatever its size."
    ]
    if packed:
        sentences.append(
            f"{packed} layers have few bits, and each product first unpacks its matrix: memory is small, time is not."
        )
    if gathers:
        sentences.append(
            f"{gathers} of them also move their inputs or outputs into order (storage pivoted or columns)."
        )
    if odd:
        sentences.append(
            f"{odd} of {len(layers)} ranks are not multiples of {multiple}, the tile of {dtype} on {device}: compress "
            f"with --rank-multiple {multiple}."
        )
    if cost.head_bytes:
        sentences.append(
            f"The output embedding, which is not compressed, is {cost.head_bytes / cost.weight_bytes:.0%} of the bytes "
            f"read for each token."
        )
    return sentences


def to_dict(cost: Cost) -> dict[str, Any]:
    return {name: getattr(cost, name) for name in ("macs", "weight_bytes", "head_bytes", "cache_bytes")}
