"""The bench: limits against counts by hand, figures against a model that takes a known time."""

import itertools
import json

import pytest
import torch
from conftest import NEWER, factorize_all_

import eckart
from eckart.checkpoints import checkpoint
from eckart.errors import OptionError
from eckart.model.factorise import store_
from eckart.portable import hf
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.timing import limits as speed_limits
from eckart.timing import speed

HIDDEN, VOCABULARY, LAYERS, INNER = 32, 128, 2, 64


def linear_parameters(model):
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)


@pytest.mark.parametrize("storage", ["dense", "pair", "pivoted"])
def test_work_is_what_the_sizes_say(storage):
    model, prompt = tiny_models()["llama"](), 12
    if storage != "dense":
        factorize_all_(model)
    if storage == "pivoted":
        for name in hf.specs_of(model):
            store_(model, name, "pivoted")
    attention = 2 * LAYERS * prompt * prompt * HIDDEN  # scores and values, of every head together
    linears = linear_parameters(model)
    for only_last in (True, False):
        head = VOCABULARY * HIDDEN * (1 if only_last else prompt)
        work = speed_limits.count(model, prompt, only_last=only_last)
        angles = 4 * prompt  # older transformers take the angles of rotary positions by a product
        assert work.macs - (linears * prompt + head + attention) in (0, angles)
    norms = (2 * LAYERS + 1) * HIDDEN
    indices = (
        sum(4 * max(model.get_submodule(n).weight.shape) for n in hf.specs_of(model)) if storage == "pivoted" else 0
    )
    indices = (
        sum(b.nbytes for n, b in model.named_buffers() if n.endswith(".index")) if storage == "pivoted" else indices
    )
    assert work.weight_bytes == 4 * (linears + norms + VOCABULARY * HIDDEN) + indices
    assert work.cache_bytes == 4 * LAYERS * 2 * 2 * 8  # two cached heads of 8, keys and values
    assert work.decode_bytes(3, 10) == work.weight_bytes + 30 * work.cache_bytes
    assert work.head_bytes == 4 * VOCABULARY * HIDDEN


def test_a_tied_head_is_read_and_counted_once():
    tied, untied = (speed_limits.count(tiny_models()[n](), 4, only_last=True) for n in ("llama-tied", "llama"))
    assert tied.weight_bytes == untied.weight_bytes


def test_reasons_name_what_is_there():
    model = factorize_all_(tiny_models()["llama"]())  # ranks 16 and 8
    work = speed_limits.count(model, 4, only_last=True)
    told = speed_limits.reasons(model, work, "cpu", "float32")
    assert any("4 of 14 ranks are not multiples of 16" in line for line in told)  # keys and values, of rank 8
    assert not any("into order" in line for line in told)
    assert any(f"{work.head_bytes / work.weight_bytes:.0%} of the bytes" in line for line in told)
    store_(model, "model.layers.0.mlp.up_proj", "pivoted")
    assert any("1 of them also" in line for line in speed_limits.reasons(model, work, "cpu", "float32"))
    assert speed_limits.tile("cuda:0", "bfloat16") == 64


def test_what_is_no_product_stays():
    assert speed_limits.with_rest(2.0, 1.0) == pytest.approx(2.0)
    assert speed_limits.with_rest(2.0, 0.5) == pytest.approx(1 / 0.75)
    a = torch.randn(600, 600)
    assert speed_limits.product_share(lambda: a @ a @ a, "cpu") > 0.5
    assert speed_limits.product_share(lambda: a.exp().sin(), "cpu") == 0


class Clocked:
    """A subject that takes a known time on a clock of its own."""

    def __init__(self, clock, prefill, step):
        self.clock, self.seconds = clock, (prefill, step)

    def prefill(self, ids):
        self.clock[0] += self.seconds[0]
        return ids[:, :1], None

    def step(self, token, state):
        self.clock[0] += self.seconds[1]
        return token, state


def test_figures_are_those_of_the_clock():
    clock = [0.0]
    subjects = {"compressed": Clocked(clock, 2.0, 0.25), "dense": Clocked(clock, 3.0, 0.2)}
    ids = torch.zeros((4, 10), dtype=torch.long)
    timed = speed._in_turns(subjects, ids, 5, 3, lambda: clock[0])
    work = {"compressed": speed_limits.Cost(50, 800, 0, 1), "dense": speed_limits.Cost(100, 1000, 0, 1)}
    row = speed._row(timed, work, 4, 10, 5)
    assert row["prefill"]["speedup"] == pytest.approx(1.5)
    assert row["prefill"]["limit"] == pytest.approx(2.0)
    assert row["prefill"]["of_limit"] == pytest.approx(0.75)
    assert row["prefill"]["tokens_per_second"] == pytest.approx(20.0)
    assert row["decode"]["speedup"] == pytest.approx(0.8)
    assert row["decode"]["limit"] == pytest.approx((1000 + 48) / (800 + 48))
    assert row["decode"]["tokens_per_second"] == pytest.approx(16.0)
    assert row["decode"]["dense_seconds"] == pytest.approx(0.2)


def test_spread_is_of_paired_repeats():
    times = itertools.chain([1.0, 1.0, 2.0], [2.0, 4.0, 2.0])
    seconds = {"compressed": [next(times) for _ in range(3)], "dense": [next(times) for _ in range(3)]}
    found = speed._phase(seconds, 1, 2.0)
    assert (found["speedup_low"], found["speedup"], found["speedup_high"]) == (1.5, 2.0, 3.0)  # of 2, 4, 1


@pytest.fixture
def folders(tmp_path):
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    checkpoint.save(factorize_all_(tiny_models()["llama"]()), tmp_path / "small", tokenizer=tiny_tokenizer())
    return tmp_path / "small", tmp_path / "dense"


@pytest.mark.slow
def test_the_whole_bench(folders):
    before = torch.get_num_threads()
    small, dense = folders
    result = eckart.bench(small, against=dense, batches=(1, 3), prompt=6, steps=2, repeats=2, threads=1)
    assert json.loads(json.dumps(result)) == result
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    assert result["threads"] == 1
    assert torch.get_num_threads() == before
    for phase in ("prefill", "decode"):
        assert 0 < result["rows"][0][phase]["product_share"] < 1
        assert 1 < result["rows"][0][phase]["limit_with_rest"] < result["rows"][0][phase]["limit"]
    assert result["work"]["compressed"]["macs"] < result["work"]["dense"]["macs"]
    assert result["peak_bytes"]["dense"] is None or result["peak_bytes"]["dense"] > 100_000
    slower = [
        f"{p} at batch {r['batch']}" for r in result["rows"] for p in ("prefill", "decode") if r[p]["speedup"] < 1
    ]
    assert result["slower"] == slower
    half = eckart.bench(
        small, against=dense, batches=(1,), prompt=6, steps=1, repeats=1, dtype="bfloat16", memory=False
    )
    assert half["dtype"] == "bfloat16"
    assert half["work"]["dense"]["weight_bytes"] * 2 == result["work"]["dense"]["weight_bytes"]


@pytest.mark.slow
def test_int8_times_the_exported_graphs(folders):
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    if not NEWER:
        pytest.skip("the extra `export` needs transformers 5.23")
    small, dense = folders
    result = eckart.bench(
        small, against=dense, batches=(2,), prompt=5, steps=2, repeats=1, threads=1, int8=True, memory=False
    )
    assert result["engine"] == "onnxruntime int8"
    assert result["rows"][0]["decode"]["tokens_per_second"] > 0
    work = result["work"]["dense"]
    assert work["weight_bytes"] == sum(p.numel() for p in tiny_models()["llama"]().parameters()) - VOCABULARY * HIDDEN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "batches is 0, but must be at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"int8": True, "dtype": "bfloat16"}, "int8 runs in ONNX Runtime"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_wrong_options(folders, options, message):
    with pytest.raises(OptionError, match=message):
        eckart.bench(folders[0], against=folders[1], **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folders):
    with pytest.raises(OptionError, match="torch sees no GPU"):
        eckart.bench(folders[0], against=folders[1], device="cuda")
