"""A sample of the decoders of transformers, from tiny models to loaded checkpoints; all of them by hand.

`benchmarks/architectures.py` says what is compared.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from conftest import NEWER

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import architectures
import families

# Of each kind one: plain, biased, transposed, fused, latent attention, shared keys and values, recurrent, hybrid,
# sparse attention, streams, routed experts in several forms, encoders' halves, tied blocks, converters.
RIGHT = (
    "llama gpt2 opt bloom falcon gpt_neox phi3 gemma3_text gemma3n_text gemma4_text deepseek_v3 deepseek_v4 "
    "glm_moe_dsa mamba bamba qwen3_next afmoe gpt_oss jetmoe zaya xlnet bart sarvam_moe lara_mini"
)
REFUSED = {
    "hrm_text": "run block by block, its predictions differ from its own",
    "dory": "run block by block, its predictions differ from its own",
    "git": "runs none of its blocks on token ids alone",
}
pytestmark = pytest.mark.skipif(not NEWER, reason="families of a newer transformers")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("family", RIGHT.split())
def test_a_family_comes_out_right(family: str) -> None:
    row = architectures.examined(family)
    verdicts = [architectures.verdict(row, recipe) for recipe in architectures.RECIPES]
    assert verdicts == ["right", "right"], row


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_family_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    found = architectures.outcome(family, "svd-llm", tmp_path / "it")
    assert found["is"] == "refused", found
    assert REFUSED[family] in found["said"]
    assert "\n" not in found["said"]


def test_what_is_silent_is_called_wrong() -> None:
    """A matrix that could not see a mistake would show none."""
    row = {"model_type": "x", "built": True, "walk": 0.0, "gradients": 0.2}
    row |= {recipe: {"is": "right", "said": ""} for recipe in architectures.RECIPES}
    assert [architectures.verdict(row, recipe) for recipe in architectures.RECIPES] == ["right", "wrong"]
    assert architectures.verdict({**row, "walk": 0.1}, "svd-llm") == "wrong"
    assert architectures.verdict({"built": True, "crashed": "9"}, "eckart") == "error"
    assert architectures.verdict({"built": "no"}, "eckart") == "unbuilt"


def test_the_page_says_what_was_measured() -> None:
    if architectures.RESULTS.exists():
        assert architectures.PAGE.read_text() == architectures.page(architectures.read(architectures.RESULTS))


def test_small_settings_are_small() -> None:
    assert len(families.names()) > 150
    assert max(value for value in families.SMALL.values() if type(value) is int) == 128
