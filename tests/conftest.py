"""What all tests share: tiny models, dense and factorised, a tokenizer and token ids."""

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns when a test forks
# Tiny matrices gain nothing from threads, and two test workers with two threads each wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from eckart.model.discovery import discover
from eckart.model.factorise import factorize_
from eckart.portable.linear import share_basis_, weight_view
from eckart.testing import tiny_models, tiny_tokenizer

NEWER = Version(transformers.__version__) >= Version("5.23")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Halves of surrogates in what a test printed cannot go from a worker to its master, which would end both."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's caches are not for tests: neither `~/.cache/eckart` nor the code of checkpoints that is trusted."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ECKART_CACHE", str(folder / "eckart"))
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))  # for processes that tests start
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def ids() -> torch.Tensor:
    """Two windows of token ids, `[2, 16]`."""
    return torch.randint(4, 99, (2, 16), generator=torch.Generator().manual_seed(0))


def factorize_all_(model: PreTrainedModel, share: float = 0.5) -> PreTrainedModel:
    """Replace every target by the SVD of its weight, cut at `share` of the full rank."""
    for target in discover(model).targets:
        u, s, vt = torch.linalg.svd(weight_view(model.get_submodule(target.name)).double(), full_matrices=False)
        rank = max(1, int(share * len(s)))
        factorize_(model, target.name, vt[:rank], u[:, :rank] * s[:rank])
    return model


@pytest.fixture
def make() -> Callable[..., PreTrainedModel]:
    """`make("llama")` is a tiny model with all targets factorised at half rank; `share=None` leaves it dense."""

    def maker(family: str, share: float | None = 0.5, shared_basis: bool = False) -> PreTrainedModel:
        model = tiny_models()[family]()
        if share is not None:
            factorize_all_(model, share)
        if shared_basis:
            first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
            share_basis_(first, second)
        return model

    return maker


def bench(folder: str, speedup: float, **changes: object) -> dict[str, object]:
    """A result as `eckart bench --json` prints it, whose model decodes `speedup` times as fast as the dense one."""

    def phase(ratio: float) -> dict[str, float]:
        names = ("speedup", "speedup_low", "speedup_high", "limit", "tokens_per_second", "seconds")
        figures = dict.fromkeys(names, ratio)
        return {**figures, "dense_tokens_per_second": 1.0, "dense_seconds": 1.0}

    rows = [{"batch": batch, "prompt": 8, "steps": 4, "prefill": phase(9.0), "decode": phase(s)} for batch, s in
            ((8, 99.0), (1, speedup))]  # fmt: skip
    facts = {"engine": "torch", "dtype": "float32", "device": "cpu", "device_name": "a CPU", "threads": 1, "repeats": 3}
    told = {"against": "dense", "slower": [], "reasons": ["Because."], "peak_bytes": {}}
    return {"format": "eckart-bench", "version": 1, "model": folder, "rows": rows, **facts, **told, **changes}
