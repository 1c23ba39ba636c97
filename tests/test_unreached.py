"""A layer that no calibration token reaches stays dense and is told; only where nothing is reached is it an error."""

import pytest
import torch
from torch import nn

import eckart
from eckart.errors import DataError, OptionError, PlanError
from eckart.factorizers.svd_llm import SVDLLM
from eckart.model.discovery import discover
from eckart.planning.decomposed import decompose
from eckart.tiny import tiny_models, tiny_tokenizer
from eckart.types import Entry, Group

TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (4000,), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def calibration(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return eckart.Calibration(str(tmp_path / "text.txt"), windows=6, length=32)


def with_a_spare_layer():
    """A model with a linear layer in its first block that nothing calls."""
    model = tiny_models()["llama"]()
    model.model.layers[0].spare = nn.Linear(32, 32, bias=False)
    return model


@pytest.mark.parametrize("recipe", ["svd-llm", "eckart", "d-rank", "cpsvd"])
def test_it_stays_dense_and_is_told(calibration, recipe, caplog):
    model = with_a_spare_layer()
    made = eckart.compress(model, tokenizer=tiny_tokenizer(), recipe=recipe, keep=0.6, calibration=calibration)
    name = "model.layers.0.spare"
    assert type(model.get_submodule(name)) is nn.Linear
    assert name not in {target for entry in made.plan.entries for target in entry.targets}
    assert name not in {target.name for target in made.layout.targets}
    (left,) = [skipped for skipped in made.layout.skipped if skipped.name == f"{name}.weight"]
    assert left.reason == "no token of the calibration reached it"
    assert f"stays dense, since no token of the calibration reached it: {name}" in caplog.text
    assert made.ledger.keep <= 0.6
    assert made.ledger.target_parameters_dense == sum(
        target.parameters for target in discover(tiny_models()["llama"]()).targets
    )


def test_a_plan_that_gives_it_a_rank_is_refused_by_name(calibration):
    plan = eckart.Plan((Entry(("model.layers.0.spare",), 4), Entry(("model.layers.0.self_attn.q_proj",), 4)))
    with pytest.raises(PlanError, match=r"model\.layers\.0\.spare: has a rank in the plan, but no token"):
        eckart.compress(
            with_a_spare_layer(), tokenizer=tiny_tokenizer(), recipe="svd-llm", plan=plan, calibration=calibration
        )


def test_a_group_with_such_a_member_is_left_whole():
    model = with_a_spare_layer()
    targets = {target.name: target for target in discover(model).targets}
    reached, spare = targets["model.layers.0.self_attn.q_proj"], targets["model.layers.0.spare"]
    windows = torch.randint(4, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    groups = [Group((reached, spare)), Group((targets["model.layers.1.self_attn.q_proj"],))]
    made = decompose(model, discover(model), groups, SVDLLM(), windows)
    assert list(made.left) == [reached.name, spare.name]
    assert list(made) == ["model.layers.1.self_attn.q_proj"]


def test_where_nothing_is_reached_it_is_an_error():
    model = with_a_spare_layer()
    layout = discover(model, include=["spare"])
    with pytest.raises(
        DataError,
        match=r"model\.layers\.0\.spare: no token of the calibration reached it, and so it is with every other",
    ):
        decompose(model, layout, [Group(layout.targets)], SVDLLM(), torch.full((2, 12), 5))


def test_a_device_without_float64_is_refused_before_any_work(calibration):
    with pytest.raises(OptionError, match="device is 'mps', which has no float64"):
        eckart.compress("no-such-model", device="mps", calibration=calibration)


class Chooses(nn.Module):
    """As an indexer of sparse attention: a linear layer that decides what happens, and has no gradient."""

    def __init__(self, norm: nn.Module, apart: bool) -> None:
        super().__init__()
        self.norm, self.apart = norm, apart
        self.index = nn.Linear(32, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.apart):
            chosen = self.index(x).argmax(-1, keepdim=True)
        return self.norm(x) + 0.01 * (chosen > 20)


@pytest.mark.parametrize("apart", [True, False])
def test_a_layer_without_a_gradient_stays_dense_where_gradients_decide(calibration, apart, caplog):
    def model():
        model = tiny_models()["llama"]()
        model.model.layers[0].input_layernorm = Chooses(model.model.layers[0].input_layernorm, apart)
        return model

    where = {"tokenizer": tiny_tokenizer(), "keep": 0.7, "calibration": calibration}
    name = "model.layers.0.input_layernorm.index"
    made = eckart.compress(model(), recipe="eckart", **where)
    assert isinstance(made.model.get_submodule(name), nn.Linear)
    assert f"dense, since no gradient of the loss reaches it: {name}" in caplog.text
    assert [s.reason for s in made.layout.skipped if s.name == f"{name}.weight"] == [
        "no gradient of the loss reaches it"
    ]
    # A recipe that looks at inputs alone may cut it.
    cut = eckart.compress(model(), recipe="svd-llm", **where)
    assert not isinstance(cut.model.get_submodule(name), nn.Linear)
