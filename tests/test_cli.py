"""The command line is the library, spoken: same bytes, clean JSON, one line and exit code 2 for mistakes."""

import dataclasses
import inspect
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import eckart
from eckart._cli import main
from eckart._cli.options import parse_options
from eckart.errors import UserError
from eckart.testing import tiny_models, tiny_tokenizer

TEXT = "The best rank-r approximation is the truncated SVD, in a metric that one has to choose well. " * 60


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, *argv):
    """Exit code of `eckart ARGV`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["eckart", *argv])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


SOME_TEXT = ("--data", "text.txt", "--windows", "6", "--length", "24")


def test_compress_writes_the_bytes_of_the_library(workspace, monkeypatch, capsys):
    argv = ("compress", "dense", "--recipe", "svd-llm", "--keep", "0.7", *SOME_TEXT, "-o", "factorizer.damping=1e-5")
    assert run(monkeypatch, *argv, "--out", "cli") == 0
    eckart.compress(
        "dense",
        recipe="svd-llm",
        keep=0.7,
        options={"factorizer.damping": 1e-5},
        calibration=eckart.Calibration("text.txt", windows=6, length=24),
        out="library",
    )
    for path in sorted(Path("library").iterdir()):
        assert path.read_bytes() == (Path("cli") / path.name).read_bytes(), path.name
    assert "Ledger" in capsys.readouterr().out


def test_eval_json_is_all_there_is_on_standard_output(workspace, monkeypatch, capsys):
    run(monkeypatch, "compress", "dense", "--recipe", "svd", "--keep", "0.5", "--out", "small")
    capsys.readouterr()
    argv = ("eval", "small", "--against", "dense", "--data", "text.txt", "--data", "other.txt", "--windows", "3")
    assert run(monkeypatch, *argv, "--length", "24", "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert said.err == ""
    assert len(result["results"]) == 2
    assert all(row["perplexity"] > 1 and row["dense_perplexity"] > 1 for row in result["results"])
    assert result == json.loads(
        json.dumps(
            eckart.evaluate("small", against="dense", data_specs=["text.txt", "other.txt"], windows=3, length=24)
        )
    )


def test_eval_table_states_the_protocol(workspace, monkeypatch, capsys):
    assert run(monkeypatch, "eval", "dense", "--data", "text.txt", "--windows", "3", "--length", "24") == 0
    out = capsys.readouterr().out
    for words in ("Perplexity", "3 x 24", "windows of 24 tokens, stride 24", "BOS start", "mean over tokens"):
        assert words in out


def test_plan_and_replay(workspace, monkeypatch, capsys):
    assert run(monkeypatch, "plan", "dense", "--keep", "0.6", *SOME_TEXT, "--out", "plan.json", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("plan.json").read_text())
    assert run(monkeypatch, "compress", "dense", "--plan", "plan.json", *SOME_TEXT, "--out", "a") == 0
    assert run(monkeypatch, "compress", "dense", "--keep", "0.6", *SOME_TEXT, "--out", "b") == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_inspect(workspace, monkeypatch, capsys):
    assert run(monkeypatch, "inspect", "dense", "--exclude", "*.k_proj") == 0
    out = capsys.readouterr().out
    assert "self_attn.q_proj" in out
    assert "matches --exclude *.k_proj" in out
    assert run(monkeypatch, "inspect", "dense", "--json") == 0
    layout = json.loads(capsys.readouterr().out)
    assert len(layout["targets"]) == 14
    assert sum(s["parameters"] for s in layout["skipped"]) + sum(
        t["out_features"] * t["in_features"] for t in layout["targets"]
    ) == layout["parameters"]  # fmt: skip


def test_methods(workspace, monkeypatch, capsys):
    assert run(monkeypatch, "methods") == 0
    assert "svd_llm + uniform" in capsys.readouterr().out
    assert run(monkeypatch, "methods", "--json") == 0
    assert json.loads(capsys.readouterr().out)["factorizers"]["asvd"]["alpha"] == 0.5


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("compress", "nowhere/at/all", "--out", "o"), "no such folder"),
        (("compress", "dense", "--keep", "0", "--recipe", "svd", "--out", "o"), "must lie in (0, 1]"),
        (("compress", "dense", "--keep", "1.2", "--recipe", "svd", "--out", "o"), "must lie in (0, 1]"),
        (("compress", "dense", "--recipe", "svdd", "--out", "o"), "did you mean 'svd'"),
        (("compress", "dense", "--recipe", "svd", "--out", "dense"), "exists and is not empty"),
        (("compress", "dense", "--recipe", "svd", "--out", "o", "-o", "damping"), "must look like"),
        (("compress", "dense", "--data", "none.txt", "--out", "o"), "none.txt"),
        (("compress", "dense", "--data", "text.txt", "--windows", "9999", "--length", "24", "--out", "o"), "9999"),
        (("compress", "dense", "--plan", "none.json", "--out", "o"), "no such plan file"),
        (("eval", "text.txt", "--data", "text.txt"), "text.txt"),
        (("eval", "dense", "--data", "text.txt", "--mean", "median", "--length", "24"), "mean is 'median'"),
        (("inspect", "dense", "--include", "nothing"), "no linear layer to compress"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(workspace, monkeypatch, capsys, argv, text):
    assert run(monkeypatch, *argv) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert said.err.startswith("eckart: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("svd-llm", "model.layers.0.self_attn.q_proj: NaN or infinity"),
        ("eckart", "model.layers.0: its output holds NaN or infinity"),
    ],
)
def test_numerical_trouble_is_exit_code_1(workspace, monkeypatch, capsys, recipe, text):
    import torch

    model = tiny_models()["llama"]()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(torch.inf)
    model.save_pretrained("broken")
    tiny_tokenizer().save_pretrained("broken")
    assert run(monkeypatch, "compress", "broken", "--recipe", recipe, *SOME_TEXT, "--out", "o") == 1
    assert text in capsys.readouterr().err


def test_options_are_parsed():
    assert parse_options(["a.b=c=d"]) == {"a.b": "c=d"}
    with pytest.raises(UserError, match="must look like"):
        parse_options(["=1"])


def test_version_as_an_installed_program():
    said = subprocess.run([sys.executable, "-m", "eckart", "--version"], capture_output=True, text=True, check=True)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert said.stdout.strip() == f"eckart {project['version']}" == f"eckart {eckart.__version__}"


def test_inspect_shows_the_effective_ranks(workspace, monkeypatch, capsys):
    """The oracle: the entropy of the energies of the outputs on the calibration data, from a plain run."""
    import torch

    assert run(monkeypatch, "inspect", "dense", "--spectra", *SOME_TEXT, "--json") == 0
    rows = {row["targets"][0]: row for row in json.loads(capsys.readouterr().out)["spectra"]}
    assert len(rows) == 14
    name, seen = "model.layers.1.mlp.down_proj", []
    model = eckart.checkpoints.checkpoint.load_model("dense")
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=eckart.load_windows("text.txt", tiny_tokenizer(), windows=6, length=24).ids, use_cache=False)
    energy = torch.linalg.svdvals(seen[0].flatten(0, 1).double()).square()
    shares = energy / energy.sum()
    expected = float(torch.exp(-(shares * shares.log()).sum()))
    assert rows[name]["energy_effective_rank"] == pytest.approx(expected, rel=1e-3)
    assert rows[name]["stable_rank"] == pytest.approx(float(energy.sum() / energy[0]), rel=1e-3)
    assert run(monkeypatch, "inspect", "dense", "--spectra", *SOME_TEXT, "--recipe", "basis-sharing") == 0
    shown = capsys.readouterr().out
    assert "Spectra" in shown
    assert "more" in shown  # the rest of a group; the table folds to the terminal
    assert run(monkeypatch, "inspect", "dense", "--json") == 0
    assert "spectra" not in json.loads(capsys.readouterr().out)


def test_every_command_has_json_verbose_and_an_example_that_parses(monkeypatch, capsys):
    """The example of each help is a command that the parser takes; the work itself is not run."""
    from eckart._cli.app import commands

    group = commands()
    assert len(group.commands) >= 9
    for name, command in group.commands.items():
        flags = {flag for option in command.params for flag in option.opts}
        assert {"--json", "--verbose", "-v"} <= flags, name
        examples = re.findall(r"Example: `eckart (\S+) ?(.*?)`", " ".join(command.help.split()))
        assert len(examples) == 1, name
        assert examples[0][0] == name
        command.make_context(name, shlex.split(examples[0][1]))
        assert run(monkeypatch, name, "--help") == 0
        assert "Example:" in capsys.readouterr().out


def options(command):
    """`{name: (flags, default, help)}` of a command."""
    from eckart._cli.app import commands

    found = {option.name: option for option in commands().commands[command].params}
    return {key: (option.opts, option.default, getattr(option, "help", None)) for key, option in found.items()}


def test_what_is_compressed_can_be_planned_with_the_same_options():
    """The commands and the functions spell a long list out, and this keeps the lists the same."""
    compressing, planning = options("compress"), options("plan")
    assert compressing.keys() - planning.keys() == {"plan", "recover"}
    assert {key: compressing[key] for key in planning if key != "out"} == {
        key: value for key, value in planning.items() if key != "out"
    }
    compress, plan = (inspect.signature(function).parameters for function in (eckart.compress, eckart.plan))
    assert compress.keys() - plan.keys() == {"plan", "out", "on_plan"}
    assert [compress[name] for name in plan] == list(plan.values())
    calibrating = {field.name: field.default for field in dataclasses.fields(eckart.Calibration)}
    for name, (_, default, _) in planning.items():
        if name in plan or name in calibrating:
            expected = calibrating[name] if name in calibrating else plan[name].default
            given = default.replace("\\n", "\n") if name == "join" else default
            assert given == expected or name == "model" or (given, expected) == ([], ()), name


def test_the_plan_knows_the_stored_dtype(workspace, monkeypatch, capsys):
    """Half the bytes for each number: of what a size buys, a plan for float16 has more than one for float32."""
    sizes = {}
    for dtype in ("float32", "float16"):
        argv = ("plan", "dense", "--recipe", "svd", "--size", "60KB", "--dtype", dtype, "--out", f"{dtype}.json")
        assert run(monkeypatch, *argv) == 0
        sizes[dtype] = json.loads(Path(f"{dtype}.json").read_text())["reached"]["target_parameters_kept"]
    assert sizes["float16"] > sizes["float32"]


@pytest.mark.parametrize("name", ["report", "compare"])
def test_who_evaluates_with_an_option_can_report_and_compare_with_it(name):
    """Tasks are left to `eval`, whose results the two read."""
    wanted = options("eval").keys() - {"model", "tasks", "include_path", "limit", "data", "against"}
    mine, theirs = options(name), options("eval")
    assert {"windows", "length", "seed", "join", "bos", "mean", "device", "dtype"} <= wanted
    assert {key: mine.get(key) for key in wanted} == {key: theirs[key] for key in wanted}
    assert {"data", "against"} <= mine.keys()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("compress",), "Missing argument"),
        (("nosuch",), "No such command 'nosuch'. See eckart --help."),
        (("eval", "dense", "--windows", "0"), "--windows"),
        (("eval", "dense", "--nonsense"), "No such option: --nonsense"),
        (("compress", "dense", "--keep", "much", "--out", "o"), "'--keep': Input should be a valid number"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(monkeypatch, capsys, argv, text):
    assert run(monkeypatch, *argv) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert said.err.startswith("eckart: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_verbose_says_the_stages_and_nothing_is_said_without_it(workspace, monkeypatch, capsys):
    argv = ("plan", "dense", "--recipe", "svd-llm", "--keep", "0.7", *SOME_TEXT, "--out")
    try:
        assert run(monkeypatch, *argv, "a.json", "--json") == 0
        assert capsys.readouterr().err == ""
        assert run(monkeypatch, *argv, "b.json", "--json", "-v") == 0
        said = capsys.readouterr()
        assert "eckart.run: calibrate and decompose: " in said.err
        assert json.loads(said.out) == json.loads(Path("a.json").read_text())
    finally:
        logger = logging.getLogger("eckart")
        logger.handlers, level = [], logging.NOTSET
        logger.setLevel(level)


@pytest.mark.parametrize(("words", "expected"), [("eckart com", "compress compare"), ("eckart eval --ag", "--against")])
def test_the_shell_completes(words, expected):
    """What the completion that `--install-completion` installs asks for on a tab."""
    environment = {
        **os.environ,
        "_ECKART_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    program = "import sys; sys.argv = ['eckart']; from eckart._cli import main; main()"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert set(said.stdout.split()) == set(expected.split()), said.stderr


def test_piped_output_has_no_control_characters(workspace, monkeypatch, capsys):
    for argv in (("inspect", "dense"), ("compress", "dense", "--recipe", "svd", "--out", "piped"), ("methods",)):
        assert run(monkeypatch, *argv) == 0
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err
        assert said.err == ""


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(monkeypatch, "methods") == 2
    assert capsys.readouterr().err == "eckart: the working folder is gone; change to one that exists.\n"
    monkeypatch.undo()


def test_an_error_of_the_system_is_one_line_and_a_fault_of_ours_is_shown_whole(monkeypatch, capsys):
    def fails(error):
        def verify(*_, **__):
            raise error

        monkeypatch.setattr(eckart, "verify", verify)

    fails(OSError(5, "Input/output error", "weights"))
    assert run(monkeypatch, "verify", "x") == 1
    assert capsys.readouterr().err == "eckart: weights: Input/output error. -vv says where.\n"
    fails(ZeroDivisionError("a fault of ours"))
    monkeypatch.setattr(sys, "argv", ["eckart", "verify", "x"])
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        main()
