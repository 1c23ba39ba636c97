"""transformers knows our format in every order of imports; alone, neither import drags the other in."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.checkpoints import checkpoint

REGISTRY = "import transformers.quantizers.auto as r"
ORDERS = {
    "eckart first": f"import eckart; {REGISTRY}",
    "transformers first": f"import transformers, eckart; {REGISTRY}",
    "the registry first": f"{REGISTRY}; import eckart",
    "both, then eckart again": (
        f"import eckart, sys; {REGISTRY}; [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('eckart')]; "
        "import eckart"
    ),
}


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_the_quantizer_is_registered_in_every_order(order: str) -> None:
    code = f"{ORDERS[order]}\nprint(r.AUTO_QUANTIZER_MAPPING['eckart'], r.AUTO_QUANTIZATION_CONFIG_MAPPING['eckart'])"
    assert run(code) == "<class 'eckart.portable.hf.EckartQuantizer'> <class 'eckart.portable.hf.EckartConfig'>\n"


def test_importing_eckart_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, eckart; print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    assert run(code) == "set()\n"


def test_a_light_import_of_transformers_stays_light() -> None:
    assert run("import sys, eckart, transformers; print('eckart.portable.hf' in sys.modules)") == "False\n"


def test_plain_transformers_loads_a_checkpoint(make: Callable[..., Any], tmp_path: Path) -> None:
    model = make("llama")
    checkpoint.save(model, tmp_path / "saved")
    code = """
import sys, eckart, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, model(torch.arange(8)[None]).logits.double().sum().item())
"""
    expected = model(torch.arange(8)[None]).logits.double().sum().item()
    assert run(code, str(tmp_path / "saved")) == f"LlamaForCausalLM {expected}\n"
