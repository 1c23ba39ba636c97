"""Tokens per second of a compressed model beside the dense one, in turns, and beside the limit."""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from eckart.checkpoints import checkpoint
from eckart.engines import exporting
from eckart.engines.onnx_model import GRAPH
from eckart.errors import OptionError
from eckart.progress import Progress, silent
from eckart.support import dtypes
from eckart.support.extras import require
from eckart.support.versions import versions
from eckart.timing import limits as speed_limits
from eckart.timing import subjects as speed_subjects
from eckart.timing.limits import Cost
from eckart.timing.peak_memory import peak_memory
from eckart.timing.subjects import Subject

Seconds = dict[str, list[float]]  # one figure for each repeat, of "compressed" and "dense"


def bench(
    model: str | Path,
    *,
    against: str | Path,
    batches: Sequence[int] = (1, 8, 64),
    prompt: int = 128,
    steps: int = 16,
    repeats: int = 5,
    threads: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    int8: bool = False,
    graphs: str | Path | None = None,
    memory: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time `model` and the dense model `against` in turns, on random prompts of `prompt` tokens.

    Each repeat runs the prompt once untimed and once timed (the time to the first token) and then `steps`
    tokens one by one, of `batch` sequences at once, first with one model and then with the other, the
    order changing. `speedup` is the median over repeats of dense time over compressed time, `speedup_low` and
    `speedup_high` its quartiles; `limit` is that of `eckart.timing.limits`, and `limit_with_rest` what is
    left of it since `1 - product_share` of the dense model's time goes into other things than products.

    `int8` exports both to ONNX with 8-bit weights and activations first and times ONNX Runtime; the graphs
    are kept in the folder `graphs`, if it is named, and taken from there the next time. `threads` None
    leaves torch's number. Peak memory is each model's alone, at the largest batch. CUDA is timed with
    synchronisation but has not been tried. Returns plain data. Raises `OptionError` for a number out of range,
    a missing device, or the missing extra `export`.
    """
    _check(
        batches=batches, prompt=[prompt], steps=[steps], repeats=[repeats], threads=[1 if threads is None else threads]
    )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(f"device is {device!r}, but torch sees no GPU here; use cpu.")
    if int8 and (device != "cpu" or dtype != "auto"):
        raise OptionError("int8 runs in ONNX Runtime on the CPU and has its own dtype; leave out device and dtype.")
    if int8:
        require("export", "bench with int8", "onnx", "onnxscript", "onnxruntime")
    names = {"compressed": str(model), "dense": str(against)}
    with _threads(threads) as thread_count, tempfile.TemporaryDirectory() as scratch:
        costs, dtype, why, vocabulary = _count(names, prompt, dtype, device, int8)
        if int8:
            names = {key: _exported(name, Path(graphs or scratch) / key) for key, name in names.items()}
        subjects = {key: speed_subjects.load(name, dtype, device, thread_count) for key, name in names.items()}
        rows = []
        for number, batch in enumerate(batches):
            progress("bench", number, len(batches))
            ids = speed_subjects.prompt_ids(vocabulary, batch, prompt, device)
            seconds = _in_turns(subjects, ids, steps, repeats, _clock(device))
            shares = None if int8 else _product_shares(subjects["dense"], ids, device)
            rows.append(_row(seconds, costs, batch, prompt, steps, shares))
        progress("bench", len(batches), len(batches))
        peak = _peaks(names, subjects, dtype, device, thread_count, (max(batches), prompt, 2)) if memory else {}
    slow = [f"{phase} at batch {row['batch']}" for row in rows for phase in ("prefill", "decode")
            if row[phase]["speedup"] < 1]  # fmt: skip
    return {
        "format": "eckart-bench",
        "version": 1,
        "model": str(model),
        "against": str(against),
        "engine": "onnxruntime int8" if int8 else "torch",
        "dtype": dtype,
        "device": device,
        "device_name": _device_name(device),
        "threads": thread_count,
        "repeats": repeats,
        "rows": rows,
        "peak_bytes": peak,
        "work": {key: speed_limits.to_dict(cost) for key, cost in costs.items()},
        "slower": slow,
        "reasons": why,
        "versions": versions(),
    }


def _check(**numbers: Sequence[int]) -> None:
    for name, values in numbers.items():
        for value in values:
            if value < 1:
                raise OptionError(f"{name} is {value}, but must be at least 1.")


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _count(
    names: dict[str, str], prompt: int, dtype: str, device: str, int8: bool
) -> tuple[dict[str, Cost], str, list[str], int]:
    """What both models cost, the computing dtype, what holds the compressed one back, the vocabulary's size."""
    costs, why, torch_dtype = {}, [], dtypes.named(dtype)
    vocabulary = 0
    for key, name in names.items():
        loaded = checkpoint.load_model(name, device=device)
        # Both in the dtype of the compressed one, which comes first.
        torch_dtype = torch_dtype or (torch.float32 if int8 else dtypes.compute_dtype(loaded.dtype, loaded.device))
        dtypes.cast_(loaded, torch_dtype)
        costs[key] = speed_limits.count(loaded.eval(), prompt, only_last=not int8, weight_itemsize=1 if int8 else None)
        vocabulary = loaded.config.vocab_size
        if key == "compressed":
            label = "int8" if int8 else str(torch_dtype).removeprefix("torch.")
            why = speed_limits.reasons(loaded, costs[key], device, label)
    assert torch_dtype is not None
    return costs, str(torch_dtype).removeprefix("torch."), why, vocabulary


def _exported(name: str, out: Path) -> str:
    if (out / GRAPH).is_file():
        return str(out)
    return exporting.export(name, to="onnx", out=out, int8=True).out


def _clock(device: str) -> Callable[[], float]:
    """A clock that waits until the device has finished its work."""

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _in_turns(
    subjects: dict[str, Subject], ids: torch.Tensor, steps: int, repeats: int, now: Callable[[], float]
) -> tuple[Seconds, Seconds]:
    """Seconds of the prompt, and of one step (the median of a repeat's steps)."""
    prefill: Seconds = {key: [] for key in subjects}
    decode: Seconds = {key: [] for key in subjects}
    for number in range(repeats):
        for key in list(subjects) if number % 2 else reversed(subjects):
            first, each = _once(subjects[key], ids, steps, now)
            prefill[key].append(first)
            decode[key].append(statistics.median(each))
    return prefill, decode


def _once(subject: Subject, ids: torch.Tensor, steps: int, now: Callable[[], float]) -> tuple[float, list[float]]:
    subject.prefill(ids)  # not timed: the other model has just run, and a server's model is never cold
    start = now()
    token, state = subject.prefill(ids)
    at = now()
    first, each = at - start, []
    for _ in range(steps):
        token, state = subject.step(token, state)
        each.append((after := now()) - at)
        at = after
    return first, each


def _product_shares(dense: Subject, ids: torch.Tensor, device: str) -> tuple[float, float]:
    """Shares of the dense model's time that are products: in the prompt, and in one step."""
    token, state = dense.prefill(ids)
    in_prompt = speed_limits.product_share(lambda: dense.prefill(ids), device)
    return in_prompt, speed_limits.product_share(lambda: dense.step(token, state), device)


def _row(
    seconds: tuple[Seconds, Seconds],
    costs: dict[str, Cost],
    batch: int,
    prompt: int,
    steps: int,
    shares: tuple[float, float] | None = None,
) -> dict[str, Any]:
    prefill, decode = seconds
    middle = prompt + steps // 2
    bytes_read = {key: cost.decode_bytes(batch, middle) for key, cost in costs.items()}
    phases = {
        "prefill": _phase(prefill, batch * prompt, costs["dense"].macs / costs["compressed"].macs),
        "decode": _phase(decode, batch, bytes_read["dense"] / bytes_read["compressed"]),
    }
    for phase, share in zip(phases.values(), shares or (), strict=False):
        limit = speed_limits.with_rest(phase["limit"], share)
        phase |= {"product_share": share, "limit_with_rest": limit, "of_limit_with_rest": phase["speedup"] / limit}
    return {"batch": batch, "prompt": prompt, "steps": steps, **phases}


def _phase(seconds: Seconds, tokens: int, limit: float) -> dict[str, float]:
    ratios = [dense / small for dense, small in zip(seconds["dense"], seconds["compressed"], strict=True)]
    low, speedup, high = _quartiles(ratios)
    row = {"speedup": speedup, "speedup_low": low, "speedup_high": high, "limit": limit, "of_limit": speedup / limit}
    for key, prefix in (("compressed", ""), ("dense", "dense_")):
        fast, middle, slow = _quartiles(seconds[key])
        row |= {f"{prefix}seconds": middle, f"{prefix}seconds_low": fast, f"{prefix}seconds_high": slow}
        row[f"{prefix}tokens_per_second"] = tokens / middle
    return row


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _peaks(
    names: dict[str, str],
    subjects: dict[str, Subject],
    dtype: str,
    device: str,
    threads: int,
    load: tuple[int, int, int],
) -> dict[str, int | None]:
    """Peak bytes of each model alone at the largest batch: in a new process on a CPU, the allocator's on a GPU."""
    batch, prompt, steps = load
    if not device.startswith("cuda"):
        return {key: peak_memory(name, dtype, threads, *load) for key, name in names.items()}
    peaks: dict[str, int | None] = {}
    subjects.clear()
    for key, name in names.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        subject = speed_subjects.load(name, dtype, device, threads)
        vocabulary: int = subject.model.config.vocab_size  # type: ignore[attr-defined]
        _once(subject, speed_subjects.prompt_ids(vocabulary, batch, prompt, device), steps, _clock(device))
        peaks[key] = torch.cuda.max_memory_allocated(device)
        del subject
    return peaks


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
