"""Exports against torch: logits with and without a cache, greedy tokens, a process without this package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NEWER, factorize_all_
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import eckart
from eckart.checkpoints import checkpoint
from eckart.errors import OptionError, OutputError
from eckart.model.factorise import store_
from eckart.portable import hf
from eckart.portable.linear import empty_like, share_basis_, swap_
from eckart.testing import tiny_models, tiny_tokenizer

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
if not NEWER:
    pytest.skip("the extra `export` needs transformers 5.23", allow_module_level=True)
from eckart.engines.onnx_model import OnnxModel  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # an export takes ten seconds, on a busy machine a minute


def every_storage(family="llama"):
    """A model that holds each storage: pair, shared basis, pivoted on either side, preserved columns, dense."""
    model = factorize_all_(tiny_models()[family]())
    names = sorted(hf.specs_of(model))
    if family == "llama":
        first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (0, 1))
        share_basis_(first, second)
        store_(model, "model.layers.0.mlp.up_proj", "pivoted")
        store_(model, "model.layers.0.mlp.down_proj", "pivoted")
        store_(model, "model.layers.1.mlp.gate_proj", "pivoted")
        kept = empty_like(
            model.get_submodule("model.layers.1.mlp.up_proj"), {"storage": "columns", "rank": 9, "kept": 5}
        )
        generator = torch.Generator().manual_seed(3)
        for parameter in kept.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        kept.column_order.copy_(torch.tensor([i for i in range(32) if i % 7] + [i for i in range(32) if i % 7 == 0]))
        swap_(model, "model.layers.1.mlp.up_proj", kept)
    else:
        for name in names[::2]:
            store_(model, name, "pivoted")
    assert {spec["storage"] for spec in hf.specs_of(model).values()} >= {"pair", "pivoted"}
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(every_storage(), folder, tokenizer=tiny_tokenizer(), provenance={"made": "by hand"})
    return folder


@pytest.fixture(scope="module")
def graph(saved):
    out = saved.parent / "onnx"
    made = eckart.export(saved, to="onnx", out=out)
    assert made.bytes == sum(path.stat().st_size for path in out.iterdir())
    return out


IDS = np.random.RandomState(0).randint(4, 99, (3, 11))


def torch_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def test_onnx_logits_are_those_of_torch_for_every_storage(saved, graph):
    wanted, session = torch_logits(eckart.load(saved)), OnnxModel(graph, threads=1)
    got, past = session(IDS)
    np.testing.assert_allclose(got, wanted, atol=2e-5)
    assert all(array.shape[2] == 11 for array in past.values())
    # The same in three pieces with the cache between them: prompt, single step, several at once.
    pieces, past = [], None
    for piece in np.split(IDS, [5, 6], axis=1):
        logits, past = session(piece, past)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), wanted, atol=2e-5)


def test_onnx_greedy_tokens_are_those_of_generate(saved, graph):
    model, prompt = eckart.load(saved), IDS[:1]
    made = model.generate(torch.tensor(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    # `min_new_tokens` forbids the end of the text; so does a search among the logits without it
    session, past, tokens = OnnxModel(graph, threads=1), None, prompt
    found = []
    for _ in range(12):
        logits, past = session(tokens, past)
        logits[0, -1, model.generation_config.eos_token_id] = -np.inf
        found.append(int(logits[0, -1].argmax()))
        tokens = np.array([found[-1:]])
    assert found == made[0, prompt.shape[1] :].tolist()


ONNX_ALONE = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
ids = np.load(sys.argv[2])
feeds = {"input_ids": ids, "position_ids": np.arange(ids.shape[1])[None].repeat(len(ids), 0)}
for spec in session.get_inputs()[2:]:
    feeds[spec.name] = np.zeros((len(ids), 2, 0, 8), np.float32)
np.save(sys.argv[3], session.run(["logits"], feeds)[0])
assert not {"eckart", "torch", "transformers"} & set(sys.modules)
"""
OPENVINO_ALONE = """
import sys, numpy as np, openvino
request = openvino.compile_model(
    sys.argv[1] + "/openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}  # not bfloat16
).create_infer_request()
ids, made = np.load(sys.argv[2]), []
for first, last in ((0, 5), (5, 6), (6, ids.shape[1])):  # the cache is inside
    feeds = {"input_ids": ids[:, first:last], "position_ids": np.arange(first, last)[None].repeat(len(ids), 0)}
    feeds["beam_idx"] = np.arange(len(ids), dtype=np.int32)
    made.append(request.infer(feeds)["logits"].copy())
np.save(sys.argv[3], np.concatenate(made, 1))
assert not {"eckart", "torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_it_runs_in_a_process_without_this_package(saved, graph, tmp_path, to):
    """Nor torch, nor transformers: the runtime and numpy."""
    if to == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
        graph = tmp_path / "graph"
        eckart.export(saved, to="openvino", out=graph)
    np.save(tmp_path / "ids.npy", IDS)
    script = {"onnx": ONNX_ALONE, "openvino": OPENVINO_ALONE}[to]
    command = [sys.executable, "-c", script, graph, tmp_path / "ids.npy", tmp_path / "logits.npy"]
    subprocess.run(command, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), torch_logits(eckart.load(saved)), atol=5e-5)
    assert "quantization_config" not in json.loads((graph / "config.json").read_text())
    assert json.loads((graph / "origin.json").read_text())["checkpoint"]["made"] == "by hand"


def test_onnx_int8_is_near_and_smaller(saved, graph, tmp_path):
    made = eckart.export(saved, to="onnx", out=tmp_path / "int8", int8=True)
    wanted, got = torch_logits(eckart.load(saved)), OnnxModel(tmp_path / "int8", threads=1)(IDS)[0]
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.2
    weights = "model.onnx.data"
    assert (tmp_path / "int8" / weights).stat().st_size < 0.6 * (graph / weights).stat().st_size
    assert "8-bit weights and activations" in made.note


def test_the_output_embedding_is_int8_too_where_it_is_tied(tmp_path):
    onnx = pytest.importorskip("onnx")
    # A small table is transposed ahead of time, and is then no longer tied.
    large = LlamaConfig(
        vocab_size=40_000, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    checkpoint.save(LlamaForCausalLM(large), tmp_path / "tied", tokenizer=tiny_tokenizer())
    out = eckart.export(tmp_path / "tied", to="onnx", out=tmp_path / "graph", int8=True).out
    graph = onnx.load(Path(out) / "model.onnx", load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name for tensor in graph.initializer}

    def is_weight(name):
        node = made_by.get(name)
        passing = ("DequantizeLinear", "Transpose", "Cast", "Identity")
        return name in weights if node is None else node.op_type in passing and is_weight(node.input[0])

    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and any(map(is_weight, n.input))]
    assert not products  # in float32, that is: an int8 one is another operator
    assert any("Integer" in n.op_type or "Quantize" in n.op_type for n in graph.node)


def test_openvino_int8_is_smaller(tmp_path, saved):
    pytest.importorskip("nncf", reason="nncf is not installed")
    made = eckart.export(saved, to="openvino", out=tmp_path / "int8", int8=True)
    assert (tmp_path / "int8" / "openvino_model.bin").stat().st_size < 0.5 * made.source_bytes


def test_a_family_with_transposed_weights(tmp_path):
    model = every_storage("gpt2")
    checkpoint.save(model, tmp_path / "model", tokenizer=tiny_tokenizer())
    eckart.export(tmp_path / "model", to="onnx", out=tmp_path / "graph")
    np.testing.assert_allclose(OnnxModel(tmp_path / "graph", 1)(IDS)[0], torch_logits(model), atol=2e-5)


def test_merged_is_an_ordinary_model(saved, tmp_path):
    made = eckart.export(saved, to="merged", out=tmp_path / "merged")
    assert "gone" in made.note
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("basis" in name for name, _ in merged.named_parameters())
    np.testing.assert_allclose(torch_logits(merged), torch_logits(eckart.load(saved)), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf"}, "to is 'gguf', but must be merged, onnx, openvino"),
        ({"to": "merged", "int8": True}, "int8 goes with onnx and openvino"),
    ],
)
def test_wrong_options(saved, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        eckart.export(saved, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("eckart.support.extras.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(OptionError, match=r"needs onnxscript, not installed here: pip install 'eckart\[export\]'"):
        eckart.export(saved, to="onnx", out=tmp_path / "out")


def test_nothing_is_left_of_a_failed_export(saved, tmp_path, monkeypatch):
    def fail(*given, **named):
        raise RuntimeError("no rule for this operator\nand much more")

    monkeypatch.setattr("transformers.exporters.exporter_onnx.OnnxExporter.export", fail)
    with pytest.raises(eckart.UserError, match=r"cannot trace it .RuntimeError: no rule for this operator and much"):
        eckart.export(saved, to="onnx", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        eckart.export(saved, to="onnx", out=tmp_path / "taken")


@pytest.mark.parametrize(
    ("error", "seen", "words"),
    [(OSError(28, "No space left on device"), OutputError, "the disk is full"), (MemoryError(), MemoryError, None)],
)
def test_a_full_disk_or_memory_is_not_blamed_on_the_exporter(saved, tmp_path, monkeypatch, error, seen, words):
    def fail(*given, **named):
        raise error

    monkeypatch.setattr("transformers.exporters.exporter_onnx.OnnxExporter.export", fail)
    with pytest.raises(seen, match=words):
        eckart.export(saved, to="onnx", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
