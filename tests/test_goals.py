"""A share, a size or a predicted loss: each is met, and said before the work starts."""

import json
from dataclasses import dataclass

import pytest
import torch

import eckart
from eckart._cli import app
from eckart.checkpoints import checkpoint
from eckart.errors import BudgetError, OptionError
from eckart.factorizers.svd import SVD
from eckart.planning.goals import Goal, parse_size
from eckart.storages.pivoted import PivotedLinear
from eckart.testing import tiny_models, tiny_tokenizer

TEXT = "".join(chr(97 + (7 * i * i + i // 3) % 26) for i in range(3000))


@pytest.fixture
def folder(tmp_path):
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "dense")


@pytest.fixture
def options(folder, tmp_path):
    return {"recipe": "eckart", "calibration": eckart.Calibration(str(tmp_path / "text.txt"), 16, 24)}


def weight_file_bytes(path):
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def test_the_recipe_reaches_a_share_and_says_what_it_will_cost(folder, options, tmp_path):
    announced = []
    made = eckart.compress(folder, keep=0.7, out=tmp_path / "out", on_plan=announced.append, **options)
    assert announced == [made.plan]
    assert 0.69 < made.ledger.keep <= 0.7
    assert made.plan.reached["predicted_kl"] > 0
    loaded = checkpoint.load(tmp_path / "out")
    assert checkpoint.read_plan(tmp_path / "out").reached["predicted_kl"] == made.plan.reached["predicted_kl"]
    stored = {e.name for e in made.plan.entries if e.rank is not None}
    assert stored == {n for n, m in loaded.named_modules() if isinstance(m, PivotedLinear)}
    assert stored
    numbers = sum(loaded.get_submodule(n).basis.weight.numel() for n in stored)
    numbers += sum(loaded.get_submodule(n).coefficients.weight.numel() for n in stored)
    dense = sum(t.parameters for t in made.layout.targets if t.name not in stored)
    assert numbers + dense == made.ledger.target_parameters_kept


@pytest.mark.parametrize("recipe", ["eckart", "svd-llm", "svd"])
@pytest.mark.parametrize("part", [0.75, 0.9])
def test_a_size_is_met_by_the_files(folder, options, tmp_path, recipe, part):
    size = int(part * weight_file_bytes(tmp_path / "dense"))
    made = eckart.compress(folder, size=size, out=tmp_path / "out", **{**options, "recipe": recipe})
    assert 0.9 * size - 20_000 < weight_file_bytes(tmp_path / "out") <= size
    assert made.plan.asked == {"size": size, "rank_multiple": 1}


def test_a_bound_on_the_loss_gives_the_smallest_model_that_keeps_it(folder, options):
    options |= {"options": {"allocator.correction": "off"}}  # predicted alone; measured in test_correction.py
    bound = eckart.plan(folder, keep=0.7, **options).reached["predicted_kl"]
    made = eckart.plan(folder, max_kl=bound * 1.0001, **options)
    assert made.reached["predicted_kl"] <= bound * 1.0001
    assert made.reached["keep"] <= 0.7
    smaller = eckart.plan(folder, max_kl=bound * 4, **options)
    assert smaller.reached["keep"] < made.reached["keep"]


def test_the_prediction_is_of_the_order_of_the_measured_kl(folder, options, tmp_path):
    """A light cut of a tiny random model; not an identity, since the expansion is of second order."""
    made = eckart.compress(folder, max_kl=0.01, out=tmp_path / "out", **options)
    ids = tiny_tokenizer()(TEXT, return_tensors="pt")["input_ids"][0][:384].view(16, 24)
    with torch.no_grad():
        dense, cut = (
            checkpoint.load_model(str(f))(ids).logits[:, :-1].log_softmax(-1) for f in (folder, tmp_path / "out")
        )
    measured = float((dense.exp() * (dense - cut)).sum(-1).mean())
    assert 1 / 3 < measured / made.plan.reached["predicted_kl"] < 3


def test_the_command_line_says_the_prediction(folder, options, tmp_path, capsys):
    text = ["--data", str(tmp_path / "text.txt"), "--windows", "16", "--length", "24"]
    argv = ["plan", folder, "--recipe", "eckart", "--max-kl", "0.05", *text, "--out", str(tmp_path / "plan.json")]
    app(argv, standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "Asked: max_kl 0.05" in said
    assert "predicted KL 0.0" in said
    assert json.loads((tmp_path / "plan.json").read_text())["reached"]["predicted_kl"] <= 0.05


def test_recovery_is_one_flag(folder, tmp_path, capsys):
    text = ["--data", str(tmp_path / "text.txt"), "--windows", "8", "--length", "24"]
    argv = ["compress", folder, "--recipe", "eckart", "--keep", "0.7", *text, "--out", str(tmp_path / "out")]
    app([*argv, "--recover", "-o", "recover.epochs=1", "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert [refiner["name"] for refiner in said["recipe"]["refiners"]] == ["recover"]
    assert said["recipe"]["refiners"][0]["epochs"] == 1
    assert said["seconds"]["refine"] > 0


@pytest.mark.parametrize(
    ("text", "size"), [("80MB", 80_000_000), ("1.5 GiB", 3 * 2**29), ("1000", 1000), (7, 7), (".5kb", 500)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "80 apples", "-3MB", "0"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(OptionError, match="must be a positive number of bytes"):
        parse_size(text)


def test_two_goals_are_refused():
    with pytest.raises(OptionError, match="keep and size were both asked for"):
        Goal.of(0.8, "80MB", None)
    with pytest.raises(OptionError, match="max_kl is -1, but must be a positive"):
        Goal.of(None, None, -1.0)
    assert Goal.of(None, None, None) == Goal(keep=0.8)


def test_goals_out_of_reach_are_refused(folder, options):
    with pytest.raises(BudgetError, match=r"what is never compressed .* takes \d+; ask for more"):
        eckart.plan(folder, size="1KB", **options)
    with pytest.raises(OptionError, match="max_kl needs a recipe that predicts the loss"):
        eckart.plan(folder, recipe="svd", max_kl=0.1)


def test_a_size_below_the_smallest_ranks_is_refused(folder, options):
    with pytest.raises(BudgetError, match=r"takes \d+; ask for more") as caught:
        eckart.plan(folder, size="1KB", **options)
    more = int(str(caught.value).split("takes ")[1].split(";")[0]) + 100
    with pytest.raises(BudgetError, match=rf"^size {more} is below what the smallest ranks need; ask for more\.$"):
        eckart.plan(folder, size=more, **{**options, "recipe": "svd"})


@dataclass(frozen=True)
class Silent(SVD):
    """It could predict a loss, says its class, and does not."""

    def nats(self, statistics):
        return None


def test_a_bound_on_a_loss_that_a_method_from_outside_does_not_predict(folder, options):
    recipe = {"recipe": "svd", "options": {"factorizer": f"{__name__}:Silent"}}
    with pytest.raises(
        OptionError, match=r"^max_kl needs a recipe that predicts the loss, one with factorizer two_sided;"
    ):
        eckart.plan(folder, max_kl=0.1, **{**options, **recipe})
