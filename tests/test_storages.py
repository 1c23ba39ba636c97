"""Every storage, found by scanning its folder, keeps the contract; a saved layer of each comes back."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import eckart
from eckart import ledger, storages
from eckart.allocators.cpsvd import CPSVD
from eckart.allocators.energy_effective_rank import EnergyEffectiveRank
from eckart.allocators.error_search import ErrorSearch
from eckart.allocators.knapsack import Knapsack
from eckart.allocators.uniform import Uniform
from eckart.allocators.water_level import WaterLevel
from eckart.checks import check_entries, check_storage, problems_spectra
from eckart.errors import OptionError, PlanError
from eckart.model.factorise import store_
from eckart.portable import hf
from eckart.recipes import find
from eckart.types import Budget, Entry, Group, Target

GROUP = Group((Target("blocks.0.mlp.up", 0, "mlp.up", 48, 24, False),))
PAIR_OF = Group(tuple(replace(GROUP.targets[0], name=f"blocks.{i}.mlp.up", block=i) for i in (0, 1)))
CHOSEN = sorted(s.name for s in storages.known() if s.from_plain_pairs)  # what a user may ask for


@pytest.mark.parametrize("name", storages.names())
def test_the_contract(name):
    check_storage(storages.find(name))


def test_they_are_found_by_file_name():
    packed = ("packed", "packed_pair", "packed_pivoted", "packed_sum")
    assert storages.names() == ("columns", *packed[:3], "packed_sum", "pair", "pivoted")
    assert [storage.name for storage in storages.known()] == list(storages.names())
    for wrong in ("sparse", "base", None, ["pair"], 3):
        with pytest.raises(ValueError, match="this eckart does not know"):
            storages.find(wrong)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_layer_of_it_is_saved_with_a_model_and_comes_back(name, make, tmp_path, ids):
    model = make("llama-bias")
    for layer in hf.specs_of(model):
        store_(model, layer, name)
    eckart.save(model, tmp_path / "saved")
    loaded = eckart.load(tmp_path / "saved")
    assert hf.specs_of(loaded) == hf.specs_of(model)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


ALONE = """
import json, sys
sys.modules["eckart"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits[:, -1].tolist()))
"""


@pytest.mark.parametrize("name", CHOSEN)
def test_a_checkpoint_carries_the_files_of_its_storages_alone(name, make, tmp_path, ids, monkeypatch):
    model = make("llama")
    for layer in hf.specs_of(model):
        store_(model, layer, name)
    eckart.save(model, tmp_path / "saved")
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert {"base.py", f"{name}.py", "storages.py", "hf.py", "linear.py"} <= code
    assert "columns.py" not in code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    line = [sys.executable, "-W", "ignore", "-c", ALONE, str(tmp_path / "saved"), json.dumps(ids.tolist())]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-6)


ALLOCATORS = (
    Uniform(), WaterLevel(), WaterLevel(dense=False), WaterLevel(floor_share=0.1), Knapsack(), CPSVD(),
    EnergyEffectiveRank(), EnergyEffectiveRank(guard="code"), EnergyEffectiveRank(dense_cap=True, beta=0.2),
    ErrorSearch(candidates=6),
)  # fmt: skip


@pytest.mark.parametrize("storage", CHOSEN)
@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
@pytest.mark.parametrize("multiple", [1, 4])
def test_every_allocator_spends_its_budget_in_every_storage(allocator, storage, multiple):
    spectra = problems_spectra()
    groups = [spectrum.group for spectrum in spectra]
    for keep in (0.5, 0.77, 0.95):
        entries = allocator.allocate(spectra, Budget(keep, multiple, storage))
        check_entries(groups, entries, keep, multiple)
        assert {entry.storage for entry in entries if entry.rank is not None} <= {storage}
        for group, entry in zip(groups, entries, strict=True):
            if entry.rank is not None:
                refusal = storages.find(storage).refusal(ledger.size_of(group, entry.rank))
                assert refusal is None, f"{entry} {refusal}"


@pytest.mark.parametrize("allocator", ALLOCATORS, ids=repr)
def test_what_is_cheaper_loses_less(allocator):
    spectra = problems_spectra()
    pair, pivoted = (
        sum(0.0 if e.rank is None else s.error(e.rank) ** 2 for s, e in zip(spectra, found, strict=True))
        for found in (allocator.allocate(spectra, Budget(0.6, 1, name)) for name in ("pair", "pivoted"))
    )
    assert pivoted < pair


def test_the_rank_for_a_share():
    assert ledger.rank_for(GROUP, 1.0, Budget(1.0)) is None
    assert ledger.rank_for(GROUP, 0.5, Budget(0.5)) == 8  # 0.5 * 48 * 24 / (48 + 24)
    assert ledger.rank_for(GROUP, 0.5, Budget(0.5, 3)) == 6
    assert ledger.rank_for(GROUP, 0.5, Budget(0.5, 16)) == 8  # below the first multiple any rank will do
    assert ledger.rank_for(GROUP, 0.001, Budget(0.001)) == 1
    assert ledger.rank_for(GROUP, 0.5, Budget(0.5, 1, "pivoted")) == 9  # 9 * (72 - 9) = 567 <= 576 < 10 * 62
    assert ledger.rank_for(GROUP, 0.9999, Budget(0.9999, 1, "pivoted")) == 23


def test_a_group_that_shares_its_basis_stays_a_pair():
    assert ledger.admitted(GROUP, "pivoted") == "pivoted"
    assert ledger.admitted(PAIR_OF, "pivoted") == "pair"
    assert ledger.rank_for(PAIR_OF, 0.5, Budget(0.5, 1, "pivoted")) == ledger.rank_for(PAIR_OF, 0.5, Budget(0.5))


@pytest.mark.parametrize("multiple", [1, 2, 7, 24])
@pytest.mark.parametrize("storage", CHOSEN)
def test_the_smallest_reachable_share_counts_the_rank_multiple_and_the_storage(multiple, storage):
    least = ledger.parameters(GROUP, multiple, storage) / GROUP.parameters
    ledger.check_reachable([GROUP], min(1.0, least), multiple, storage)
    if least < 1:
        with pytest.raises(eckart.EckartError, match=f"{least:.4f}"):
            ledger.check_reachable([GROUP], least - 1e-3, multiple, storage)


def test_the_storage_is_the_recipes_and_the_users():
    assert find("svd-llm").storage == "pair"
    assert find("eckart").storage == "pivoted"
    assert find("svd-llm", {"storage": "pivoted"}).to_dict()["storage"] == "pivoted"
    assert find("eckart", {"allocator.storage": "pair"}).storage == "pair"  # as it was asked for before
    for wrong in ("columns", "sparse"):
        with pytest.raises(OptionError, match="unknown storage"):
            find("eckart", {"storage": wrong})


def test_a_recipe_file_may_name_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('storage = "pivoted"\n[factorizer]\nname = "svd"\n')
    assert find(str(path)).storage == "pivoted"
    path.write_text('[factorizer]\nname = "svd"\n[allocator]\nname = "water_level"\nstorage = "pivoted"\n')
    assert find(str(path)).storage == "pivoted"


def test_an_unknown_storage_of_a_plan_names_the_group():
    with pytest.raises(PlanError, match=r"blocks\.0\.mlp\.up: storage 'sparse' is unknown"):
        ledger.parameters(GROUP, 3, "sparse")


def test_the_ledger_adds_up_bytes_as_the_storages_say():
    entries = [Entry(GROUP.names, 5, "pivoted"), Entry(PAIR_OF.names[1:], None)]
    groups = [GROUP, Group(PAIR_OF.targets[1:])]
    book = ledger.make_ledger(groups, entries, 10_000, 2)
    assert book.target_parameters_kept == 5 * (48 + 24 - 5) + 48 * 24
    assert book.model_bytes_kept == 2 * (10_000 - 48 * 24 + 5 * (48 + 24 - 5)) + 4 * 24


def test_a_layer_of_a_storage_says_what_it_is():
    class Unfinished(storages.FactorizedLayer):
        pass

    with pytest.raises(TypeError, match=r"^Unfinished does not say what its weight is\.$"):
        _ = Unfinished().weight
    with pytest.raises(TypeError, match=r"^Unfinished does not say how it is stored\.$"):
        Unfinished().spec()


def test_the_code_of_a_checkpoint_alone_changes_no_storage(make, monkeypatch):
    model, name = make("llama"), "model.layers.0.self_attn.q_proj"
    monkeypatch.setitem(sys.modules, "eckart.maths", None)
    with pytest.raises(
        ValueError, match=r"^changing a storage needs eckart; this is the code of a checkpoint alone\.$"
    ):
        store_(model, name, "pivoted")
