"""vLLM serves every storage form: its greedy tokens are those of transformers. Skipped where vLLM is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import mix

from eckart.checkpoints import checkpoint
from eckart.portable import hf
from eckart.portable.linear import weight_view
from eckart.testing import tiny_model

pytest.importorskip("vllm", reason="vLLM is not installed (docs/serving.md)")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 192}
PROMPTS = [[5, 17, 33, 80, 41], [9, 9, 12, 60, 77, 101, 3, 55]]
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts, devices = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
llm = LLM(
    folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=64,
    tensor_parallel_size=devices, seed=0,
)
params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
made = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
print("TOKENS", json.dumps([list(m.outputs[0].token_ids) for m in made]), flush=True)
"""


def served(folder: Path, devices: int = 1) -> list[list[int]]:
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(devices > 1))}
    if devices > 1:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(devices)))
    command = [sys.executable, "-c", SERVE, str(folder), json.dumps(PROMPTS), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, (done.stdout + done.stderr)[-4000:]
    tokens: list[list[int]] = json.loads(lines[0].removeprefix("TOKENS "))
    return tokens


def expected(model: Any) -> list[list[int]]:
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]


def made(family: str, **options: Any) -> Any:
    return mix(tiny_model(family, **SIZES, **options))


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_the_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = made(family, **({"head_dim": 32} if family == "Qwen3" else {"attention_bias": True}))
    checkpoint.save(model, tmp_path / "saved")
    assert served(tmp_path / "saved") == expected(model)


def test_two_devices(tmp_path: Path) -> None:
    model = made("Llama")
    checkpoint.save(model, tmp_path / "saved")
    assert served(tmp_path / "saved", devices=2) == expected(model)


def test_dense_layers_beside_factorised_ones_in_a_fused_layer(tmp_path: Path) -> None:
    model = tiny_model("Llama", **SIZES)
    dense = {name: weight_view(model.get_submodule(name)).clone() for name in ("model.layers.0.self_attn.k_proj",)}
    mix(model)
    for name, weight in dense.items():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        model.set_submodule(name, layer)
    assert not dense.keys() & hf.specs_of(model).keys()
    checkpoint.save(model, tmp_path / "saved")
    assert served(tmp_path / "saved") == expected(model)


def test_a_model_whose_layers_vllm_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    model = mix(tiny_model("GPT2", lm_head="GPT2LMHeadModel", num_attention_heads=4, hidden_size=128))
    checkpoint.save(model, tmp_path / "saved")
    with pytest.raises(AssertionError, match=r"transformer\.h\.\d\.\w+\.\w+: cannot be served by vLLM"):
        served(tmp_path / "saved")
