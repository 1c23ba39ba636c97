"""Files that anybody may have written, changed at random: what reads them gives a value, or one line of error."""

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bench
from safetensors.torch import load_file

import eckart
from eckart.checkpoints import checkpoint, pretrained
from eckart.errors import CheckpointError, DataError, ModelError, OptionError, PlanError, UserError
from eckart.evaluation import results
from eckart.pages import comparison, report_facts, report_page
from eckart.plans.plan import Plan
from eckart.recipes import find, read_file
from eckart.support.not_finite import to_json
from eckart.testing import tiny_models, tiny_tokenizer

DEEP, DIGITS = "@deep@", "@digits@"  # what no encoder writes is put into the text afterwards
HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2.5, 10**13, 10**400, float("inf"), float("nan"), 1e300, "", "x", "dense", "3",
    "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "two\nlines", "\ud800", "\u202e", "x" * 5000, "a..b",
    "Infinity", [], [[]], [1], ["x"], {}, {"": 0}, {"x": {"y": [None]}}, DEEP, DIGITS,
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every `(container, key)` in plain data."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def changed(data: Any, draw: random.Random) -> bytes:
    """JSON of the data with one to three things changed, or its bytes damaged."""
    data = json.loads(json.dumps(data))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (known := list(places(data))):
            break
        container, key = draw.choice(known)
        how = draw.randrange(4)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[draw.choice(["x", "", "\n", "rank", "format", "\ud800"])] = container.pop(key)
        elif how == 1:
            container.append(container[key])
        else:
            container[key] = deepcopy(draw.choice(HOSTILE))
    text = json.dumps(data).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).replace(f'"{DIGITS}"', "9" * 6000)
    return damaged(text.encode(), draw) if draw.random() < 0.15 else text.encode()


def damaged(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return draw.choice(
        (
            content[:at],
            content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            content[:at] + content[at + draw.randrange(1, 20) :],
            content[:at] + content[at : at + 20] + content[at:],
            b"\xef\xbb\xbf" + content,
            content.decode().encode("utf-16"),
        )
    )


def one_line(call: Callable[[], Any]) -> Any:
    """The value of a call, or None where it refused in one line."""
    try:
        return call()
    except UserError as error:
        said = str(error)
        assert said.isprintable(), repr(said)
        assert len(said) < 3000
        return None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with everything that can stand beside its weights."""
    folder = tmp_path_factory.mktemp("hostile")
    tiny_models()["llama"]().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "text.txt").write_text("Whatever lies in a folder is read with care. " * 60)
        text = eckart.Calibration("text.txt", windows=4, length=24)
        eckart.compress("dense", recipe="basis-sharing", keep=0.6, calibration=text, out="small")
    path = folder / "small" / "provenance.json"  # without hashes, which would end all trials at once
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "files"}))
    return folder / "small"


def mutants(path: Path, into: Path, count: int, seed: int = 0) -> Iterator[Path]:
    """Write so many changed copies of a JSON file, one after the other, to `into`."""
    data, draw = json.loads(path.read_text()), random.Random(seed)
    for _ in range(count):
        into.write_bytes(changed(data, draw))
        yield into


def test_plans(small: Path, tmp_path: Path) -> None:
    read = [one_line(lambda: Plan.load(path)) for path in mutants(small / "plan.json", tmp_path / "plan.json", 400)]  # noqa: B023
    plans = [plan for plan in read if plan is not None]
    assert 20 < len(plans) < 380
    for plan in plans:
        again = Plan.from_dict(json.loads(to_json(plan.to_dict())))
        assert again.entries == plan.entries
        for entry in plan.entries:
            assert all(isinstance(name, str) and name.isprintable() and "/" not in name for name in entry.targets)
            assert entry.rank is None or type(entry.rank) is int


def test_results(small: Path, tmp_path: Path) -> None:
    base = {**report_facts.gather(small), "evaluations": [], "benches": [], "samples": None}
    protocol = {"tokens_hash": "a" * 64, "length": 24, "stride": 24, "bos": "start", "mean": "token", "join": "\n",
                "dtype": "float32", "device": "cpu"}  # fmt: skip
    row = {"data": "x.txt", "perplexity": 3.0, "dense_perplexity": 2.0, "nll": 1.1, "dense_nll": 0.7, "kl": 0.4,
           "windows": 3, "protocol": protocol}  # fmt: skip
    score = {"value": 0.5, "stderr": 0.1}
    tasks = [{"task": "t", "metrics": {"acc": score}, "dense_metrics": {"acc": score}}]
    stored = {"format": "eckart-eval", "version": 1, "model": "m", "results": [row], "tasks": tasks}
    facts = {"folder": "m", "ledger": {"model_bytes_kept": 1}, "recipe": "-", "command": None, "best": []}
    read = 0
    for number, result in enumerate((stored, bench("m", 1.5))):
        (tmp_path / "r.json").write_text(json.dumps(result))
        for path in mutants(tmp_path / "r.json", tmp_path / "changed.json", 300, seed=number):
            found = one_line(lambda: results.read(path))  # noqa: B023
            if found is not None:
                read += 1
                assert one_line(lambda: results.is_about(found, "m")) in (True, False)  # noqa: B023
                perplexities = one_line(lambda: results.perplexities([found], "m"))  # noqa: B023
                decoding = one_line(lambda: results.decoding([found], "m"))  # noqa: B023
                comparison.loss({**facts, "perplexities": perplexities or {}, "decoding": decoding})
                part = "evaluations" if found["format"] == results.EVAL else "benches"
                if read % 6 == 0:  # drawing it takes longer than all the rest
                    report_page.page({**base, part: [found]}).encode()
    assert 50 < read < 550


TOML = """
storage = "pivoted"
about = "mine"
[factorizer]
name = "svd_llm"
damping = 1e-4
[allocator]
name = "water_level"
floor_rank = 2
dense = true
correction = "off"
[grouping]
size = 1
kinds = ["*q_proj", "*k_proj"]
[[refiners]]
name = "refit_coefficients"
min_removed = 0.3
"""
VALUES = [
    "true", "-1", "0", "3", "3.7", "inf", "-inf", "nan", "1e400", '""', '"x"', '"os:system"', '"os:"', '":x"',
    '"no.such:C"', '".x:y"', '"eckart.types:Entry"', '"two\\nlines"', '"\\u001b[2J"', "[]", "[[1]]", "{}",
    "{a = 1}", "1979-05-27", "svd",
    "9" * 6000, "0x" + "f" * 6000, "[" * 5000, '"' + "x" * 5000 + '"', "99999999999999999999999",
]  # fmt: skip


def changed_toml(draw: random.Random) -> bytes:
    lines = TOML.strip().splitlines()
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(lines))
        key, equals, _ = lines[at].partition(" = ")
        how = draw.randrange(5)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(draw.randrange(len(lines)), lines[at])
        elif equals:
            lines[at] = f"{key} = {draw.choice(VALUES)}"
        else:
            lines[at] = draw.choice(
                ("[factorizer]", "[refiners]", "[[refiners]]", "[x]", "[grouping.kinds]", "factorizer = 3")
            )
    content = "\n".join(lines).encode()
    return damaged(content, draw) if draw.random() < 0.15 else content


def test_recipes(tmp_path: Path) -> None:
    draw, read, built, path = random.Random(2), 0, 0, tmp_path / "mine.toml"
    for _ in range(400):
        path.write_bytes(changed_toml(draw))
        read += one_line(lambda: read_file(path)) is not None
        built += one_line(lambda: find(str(path))) is not None
    assert 20 < built < read < 390


def test_configs(small: Path, tmp_path: Path) -> None:
    """A checkpoint with a changed configuration is refused in one line, or is the model that was saved."""
    expected = {name: p for name, p in eckart.load(small).named_parameters()}
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    (folder / "plan.json").unlink()
    loaded = 0
    for _ in mutants(small / "config.json", folder / "config.json", 60, seed=3):
        model = one_line(lambda: eckart.load(folder))
        if model is not None:
            loaded += 1
            found = dict(model.named_parameters())
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert loaded < 55


def test_configs_of_models_without_weights(small: Path, tmp_path: Path) -> None:
    for seed, source in enumerate((small, small.parent / "dense")):
        for path in mutants(source / "config.json", tmp_path / "config.json", 60, seed=seed):
            one_line(lambda: checkpoint.skeleton(str(path.parent)))  # noqa: B023


def test_pages(small: Path, tmp_path: Path) -> None:
    """What stands beside the weights for people alone is shown, or refused in one line."""
    folder = tmp_path / "copy"
    shutil.copytree(small, folder)
    shown = 0
    for seed, name in enumerate(("plan.json", "provenance.json", "spectra.json")):
        for _ in mutants(small / name, folder / name, 25, seed=seed):
            facts = one_line(lambda: report_facts.gather(folder))
            if facts is not None:
                shown += 1
                report_page.page({**facts, "evaluations": [], "benches": [], "samples": None}).encode()
        shutil.copyfile(small / name, folder / name)
    assert 10 < shown < 70


# One of each kind, by name


def plan_with(**row: Any) -> dict[str, Any]:
    entry = {"targets": ["a.b"], "rank": 3, **row}
    return {"format": "eckart-plan", "version": 1, "entries": [{k: v for k, v in entry.items() if v != "gone"}]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "must hold a JSON object"),
        ({"format": "eckart-plan", "version": 1, "entries": 3}, "entries is 3, but it must be a list"),
        ({"format": ["eckart-plan"]}, r"its format is \['eckart-plan'\]"),
        ({"format": "eckart-plan", "version": 2}, "plan version 2, but this eckart reads 1"),
        (plan_with(targets=[[1]]), r"entries\[0\].targets\[0\] is \[1\], but it must be text"),
        (plan_with(targets=[]), r"targets is \[\], but an entry must name at least one"),
        (plan_with(targets="a"), r"entries\[0\].targets is 'a', but it must be a list"),
        (plan_with(targets="gone"), r"entries\[0\] has no 'targets'"),
        (plan_with(targets=["a/b"]), "'a/b', which cannot be the name of a layer"),
        (plan_with(targets=["a..b"]), "cannot be the name of a layer"),
        (plan_with(targets=["a\nb"]), r"'a\\nb', which cannot be the name of a layer"),
        (plan_with(targets=["a" * 301]), "cannot be the name of a layer"),
        (plan_with(rank="gone"), r"entries\[0\] has no 'rank'"),
        (plan_with(rank=True), 'rank is True, but it must be a whole number from 1 on, or "dense"'),
        (plan_with(rank=0), "rank is 0, but it must be a whole number from 1 on"),
        (plan_with(rank=2.0), "rank is 2.0, but"),
        (plan_with(rank=10**400), "rank is 1000.*, but"),
        (plan_with(kept=True), "kept is True, but it must be a whole number or null"),
        (plan_with(storage="zip"), "storage is 'zip', but this eckart knows columns, packed, packed_pair, "),
        (plan_with(details=3), "details is 3, but it must be an object"),
        (plan_with(ranq=3), r"entries\[0\]: unknown key 'ranq'"),
    ],
)
def test_a_plan_is_refused_by_its_place_value_and_rule(data: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"plan.json: .*{words}"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=rf"^given: .*{words}"):
        Plan.from_dict(data, "given")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('factorizer = "svd"', "factorizer is 'svd', but it must be a table"),
        ('refiners = "x"\n[factorizer]', "refiners is 'x', but it must be a list"),
        ("refiners = [1]\n[factorizer]", r"refiners\[0\] is 1, but it must be a table"),
        ("[refiners]\n[factorizer]", r"refiners is {}, but it must be a list"),
        ("[factorizer]\nname = 3", "the name of its factorizer is 3, but it must be text"),
        ("storage = 3\n[factorizer]", "storage is 3, but it must be text"),
        ("about = 3\n[factorizer]", "about is 3, but it must be text"),
        ("[x]\n[factorizer]", r"a recipe has the table \[factorizer\]"),
        ("", r"a recipe has the table \[factorizer\]"),
        ('[[refiners]]\nname = "recover"\n[[refiners]]\nname = "recover"\n[factorizer]', "a refiner is there twice"),
        ("[[refiners]]\nname = 3\n[factorizer]", r"refiners is \[3\], but it must be names"),
        ('[factorizer]\nname = "asvd"\nalpha = [1]', r"asvd.alpha is \[1\], but must be a finite number"),
        ('[factorizer]\nname = "asvd"\nalpha = nan', "asvd.alpha is nan, but must be a finite number"),
        ('[factorizer]\nname = "asvd"\nalpha = true', "asvd.alpha is True, but must be a finite number"),
        ('[factorizer]\nname = "svd"\n[grouping]\nkinds = 3', "grouping.kinds is 3, but must be a list"),
        ('[factorizer]\nname = "svd"\n[grouping]\nkinds = [3]', "grouping.kinds is 3, but must be text"),
        ('[factorizer]\nname = "os:system"', "'os:system': is not a method; name a dataclass that extends"),
        ('[factorizer]\nname = "eckart.types:Entry"', "is not a method"),
        ('[factorizer]\nname = "eckart.allocators.uniform:Uniform"', "is not a method"),
        ('[factorizer]\nname = "eckart.factorizers.base:Factorizer"', "lacks what a method must define: metric"),
        ('[factorizer]\nname = ":x"', "cannot be imported: ValueError"),
        ('[factorizer]\nname = ".x:y"', "cannot be imported: TypeError"),
        ('[factorizer]\nname = "\\u0000:y"', "cannot be imported"),
    ],
)
def test_a_recipe_is_refused_by_its_place_value_and_rule(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(OptionError, match=words) as caught:
        find(str(tmp_path / "mine.toml"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("sweeps", 3.7, "alternating.sweeps is 3.7, but must be a whole number"),
        ("sweeps", "3.0", "alternating.sweeps is '3.0', but must be a whole number"),
        ("sweeps", 10**30, "but must be a whole number"),
        ("sweeps", float("inf"), "but must be a whole number"),
        ("sweeps", None, "but must be a whole number"),
        ("share", "nan", "alternating.share is 'nan', but must be a finite number"),
        ("share", 10**400, "but must be a finite number"),
        ("share", "1e999", "but must be a finite number"),
        ("share", {}, "but must be a finite number"),
        ("target", ["x"], "unknown value of alternating.target"),
    ],
)
def test_an_option_is_of_its_type_without_loss(option: str, value: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        find("svd-llm", {"refiners": "alternating", f"alternating.{option}": value})


def test_whole_numbers_written_otherwise_are_whole_numbers() -> None:
    overrides = {"refiners": "alternating", "alternating.sweeps": 3.0, "alternating.share": "1"}
    (refiner,) = find("svd-llm", overrides).make_refiners()
    assert (refiner.sweeps, type(refiner.sweeps), refiner.share) == (3, int, 1.0)


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "this is no Python", "1 / 0", "raise OSError('two\\nlines')"])
def test_a_module_that_cannot_be_imported(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up_method.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError, match="'made_up_method:C': cannot be imported: ") as caught:
        find("svd-llm", {"factorizer": "made_up_method:C"})
    assert str(caught.value).isprintable()


def test_a_method_from_outside_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_method.py").write_text(
        "from dataclasses import dataclass\nfrom eckart.factorizers.svd import SVD\n"
        "@dataclass(frozen=True)\nclass Needy(SVD):\n    depth: int = 0\n"
        "    def __post_init__(self):\n        raise ValueError('no depth is deep enough')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OptionError, match=r"outside_method:Needy: cannot be made .* no depth is deep enough"):
        find("svd-llm", {"factorizer": "outside_method:Needy"})
    sys.modules.pop("outside_method", None)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    for name in ("small", "dense"):
        shutil.copytree(small.parent / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": 3}, "config.json: architectures is 3, but it must be a list or null"),
        ({"architectures": [3]}, r"config.json: architectures\[0\] is 3, but it must be text"),
        ({"quantization_config": "eckart"}, "quantization_config is 'eckart', but it must be an object or null"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but it must be at most 10000"),
        ({"text_config": {"n_layer": 10**9}}, "n_layer is 1000000000, but it must be at most 10000"),
        ({"num_hidden_layers": "2"}, "no model can be read from it: "),
        ({"num_attention_heads": 0}, "no model can be read from it: ZeroDivisionError"),
        ({"hidden_size": -32}, "no model can be read from it: "),
        ({"hidden_size": "wide"}, "no model can be read from it: "),
        ({"hidden_act": "none such"}, "no model can be read from it: "),
        ({"vocab_size": None}, "no model can be read from it: "),
        ({"rope_parameters": 3}, "no model can be read from it: "),
        ({"model_type": ["llama"]}, "model_type is .*, but it must be text or null"),
    ],
)
def test_a_configuration_that_cannot_be(changes: dict[str, Any], words: str, copy: Path) -> None:
    for name in ("small", "dense"):
        edit(copy / name / "config.json", **changes)
    for kind, read in (
        (CheckpointError, lambda: eckart.load(copy / "small")),
        (ModelError, lambda: checkpoint.load_model(str(copy / "dense"))),
        (ModelError, lambda: checkpoint.skeleton(str(copy / "dense"))),
    ):
        if "quantization_config" in changes or kind is ModelError or "architectures" not in changes:
            with pytest.raises(UserError, match=words) as caught:
                read()
            assert isinstance(caught.value, kind)
            assert str(caught.value).isprintable()


def test_a_model_that_no_memory_holds(copy: Path) -> None:
    edit(copy / "dense/config.json", hidden_size=10**15)
    with pytest.raises(ModelError, match="no model can be read from it: "):
        checkpoint.load_model(str(copy / "dense"))


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"": {"rank": 1}}, "'', which cannot be the name of a layer"),
        ({"a/b": {"rank": 1}}, "'a/b', which cannot be the name of a layer"),
        ({"a\nb": {"rank": 1}}, r"'a\\nb', which cannot be the name of a layer"),
        ({"x" * 301: {"rank": 1}}, "cannot be the name of a layer"),
        ({"a": 3}, r"modules\['a'\] is 3, but it must be an object"),
        ({"a": {"rank": True}}, "a: 'rank' is True, but it must be a text or a whole number"),
        ({"a": {"rank": 10**400}}, "a: 'rank' is 1000.*, but it must be a text or a whole number"),
        ({"a": {"rank": 1.5}}, "a: 'rank' is 1.5, but it must be a text or a whole number"),
        ({"a": {"rank": 1, "basis_of": ["a"]}}, r"a: 'basis_of' is \['a'\], but it must be a text or a whole number"),
        ({"a": {"rank": 1, "basis_of": None}}, "a: 'basis_of' is None, but it must be a text or a whole number"),
        ({"a": {"storage": "two\nlines"}}, r"a: 'storage' is 'two\\nlines'"),
        (3, "modules is 3, but it must map at least one layer"),
    ],
)
def test_what_our_quantization_says_is_checked(modules: Any, words: str, copy: Path) -> None:
    path = copy / "small/config.json"
    quantization = json.loads(path.read_text())["quantization_config"]
    edit(path, quantization_config={**quantization, "modules": modules})
    with pytest.raises(CheckpointError, match=rf"config.json: quantization_config: .*{words}"):
        eckart.load(copy / "small")
    with pytest.raises(ModelError, match=words):
        checkpoint.skeleton(str(copy / "small"))
    edit(path, quantization_config={**quantization, "format_version": True})
    with pytest.raises(CheckpointError, match="format_version is True"):
        eckart.load(copy / "small")


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("../x.safetensors", "names '../x.safetensors', but a shard is a file beside the index"),
        ("/etc/passwd", "'/etc/passwd', but a shard is"),
        ("..", "'..', but a shard is"),
        ("", "'', but a shard is"),
        ("a\0b", r"'a\\x00b', but a shard is"),
        ("https://x.example/y", "but a shard is"),
        ("none.safetensors", "none.safetensors: is missing, though model.safetensors.index.json names it"),
        (3, r"weight_map\[\.\.\.\] is a whole number, but it must be text"),
    ],
)
def test_shards_lie_beside_their_index(shards: Any, words: str, copy: Path) -> None:
    state = load_file(copy / "dense/model.safetensors")
    (copy / "dense/model.safetensors").unlink()
    (copy / "dense" / pretrained.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, shards)}))
    with pytest.raises(ModelError, match=words):
        checkpoint.load_model(str(copy / "dense"))


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02.", b"garbage" * 100, b"\0" * 1000])
def test_a_damaged_pickle_is_a_damaged_model(content: bytes, copy: Path) -> None:
    """An empty one once was "interrupted": click takes an EOFError for the end of the user's input."""
    (copy / "dense/model.safetensors").unlink()
    (copy / "dense/pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="no model can be read from it: ") as caught:
        checkpoint.load_model(str(copy / "dense"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "3", '{"model": 3}', "[" * 100_000, '{"version": "1.0", "model": null}']
)
def test_a_damaged_tokenizer_is_named(content: str, copy: Path) -> None:
    (copy / "dense/tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="no tokenizer can be read from it: ") as caught:
        checkpoint.load_tokenizer(copy / "dense")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "raised",
    [EOFError(), AssertionError(), IndexError("two\nlines"), RecursionError("deep"), MemoryError(),
     OverflowError("\x1b"), type("PanicException", (BaseException,), {})("called on None")],
)  # fmt: skip
def test_whatever_a_reader_raises_is_one_line_with_its_name(raised: BaseException) -> None:
    with (
        pytest.raises(ModelError, match=f"no model can be read from it: .*{type(raised).__name__}|deep") as caught,
        pretrained.unreadable(Path("m"), ModelError, "model"),
    ):
        raise raised
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(1), OptionError("ours")])
def test_what_is_no_failure_of_the_reading_passes(raised: BaseException) -> None:
    with pytest.raises(type(raised)), pretrained.unreadable(Path("m"), ModelError, "model"):
        raise raised


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("provenance.json", {"files": 3}, "files is 3, but it must be an object or null"),
        ("provenance.json", {"files": {"model.safetensors": 3}}, r"files\[\.\.\.\] is a whole number"),
        ("provenance.json", {"files": {"model.safetensors": {}}}, r"files\[\.\.\.\] has no 'bytes'"),
        ("provenance.json", {"versions": []}, r"versions is \[\], but it must be an object"),
    ],
)
def test_a_provenance_that_a_load_cannot_use(name: str, changes: dict[str, Any], words: str, copy: Path) -> None:
    edit(copy / "small" / name, **changes)
    with pytest.raises(CheckpointError, match=rf"{name}: {words}"):
        eckart.load(copy / "small")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("provenance.json", {"ledger": {"keep": 0.5}}, "its ledger: has no 'target_parameters_dense'"),
        ("provenance.json", {"ledger": 3}, "ledger is 3, but it must be an object or null"),
        ("provenance.json", {"calibration": {"spec": "x"}}, "calibration has no 'split'"),
        ("provenance.json", {"kl": {"measured": "low"}}, "kl.measured is 'low', but it must be a number or null"),
        ("provenance.json", {"model": None}, "model is None, but it must be an object"),
        ("plan.json", {"asked": {"size": "80MB"}}, "asked.size is '80MB', but it must be a number"),
        ("plan.json", {"made_by": {"refiners": ["x"]}}, r"made_by.refiners\[0\] is 'x', but it must be an object"),
        ("spectra.json", {"groups": 3}, "groups is 3, but it must be a list"),
        ("spectra.json", {"groups": [{}]}, r"groups\[0\] has no 'targets'"),
        ("spectra.json", {"format": [1]}, r"format \[1\] version 1, but this eckart reads 'eckart-spectra' version 1"),
    ],
)
def test_notes_for_people_spoil_a_page_and_no_load(name: str, changes: dict[str, Any], words: str, copy: Path) -> None:
    edit(copy / "small" / name, **changes)
    eckart.load(copy / "small")
    with pytest.raises(CheckpointError, match=words):
        eckart.report(copy / "small")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"results": 3}, "results is 3, but it must be a list"),
        ({"results": [{"perplexity": 0}]}, r"results\[0\].perplexity is 0, but it must be more than 0"),
        ({"results": [{"perplexity": 2}]}, r"results\[0\]: a perplexity needs its data and its protocol beside it"),
        ({"model": None}, "model is None, but it must be text"),
        ({"version": 2}, "version is 2, which is none of its values"),
        ({"format": {}}, r"format is {}, but results are what"),
        ({"format": "eckart-bench"}, "has no 'rows'"),
    ],
)
def test_results_are_refused_by_their_place_value_and_rule(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    stored = {"format": "eckart-eval", "version": 1, "model": "m", "results": [], **changes}
    (tmp_path / "r.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match=rf"r.json: {words}"):
        results.read(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"lost": [[2, 0.5], [1, 0.7]]}, "the ranks of lost do not rise"),
        ({"measured_kl": {"much": 0.1}}, "measured_kl has 'much', but its keys must be shares"),
    ],
)
def test_spectra_that_cannot_be_drawn(group: dict[str, Any], words: str, copy: Path) -> None:
    path = copy / "small" / "spectra.json"
    groups = json.loads(path.read_text())["groups"]
    edit(path, groups=[{**groups[0], **group}, *groups[1:]])
    with pytest.raises(CheckpointError, match=rf"spectra\.json: groups\[0\].*{words}") as caught:
        eckart.report(copy / "small")
    assert str(caught.value).isprintable()


def test_a_page_needs_a_plan_and_a_comparison_the_ledger(copy: Path) -> None:
    edit(copy / "small" / "provenance.json", ledger=None)
    with pytest.raises(CheckpointError, match=r"small: its provenance\.json has no ledger; compress it again\.$"):
        eckart.compare([copy / "small", copy / "dense"])
    (copy / "small" / "plan.json").unlink()
    with pytest.raises(CheckpointError, match=r"small: has no plan\.json, so there is nothing to report\.$"):
        eckart.report(copy / "small")


def test_options_of_a_method_from_outside_whose_types_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "untyped_method.py").write_text(
        "from dataclasses import dataclass\nfrom eckart.factorizers.svd import SVD\n"
        "@dataclass(frozen=True)\nclass Odd(SVD):\n    depth: 'Depth' = 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = r"^untyped_method:Odd: the types of its options cannot be told: name 'Depth' is not defined\.$"
    with pytest.raises(OptionError, match=words):
        find("svd-llm", {"factorizer": "untyped_method:Odd", "factorizer.depth": 3})
    sys.modules.pop("untyped_method", None)
