"""A signal ends a command with one line that says what is kept, and leaves nothing; so does a broken output.

Commands run in children that are forked from one process, which has imported everything: that is a second for all.
"""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest

from eckart._cli import main, signals, streams
from eckart._cli.signals import Stopped, stoppable

# In a fresh process: `run(*argv)` is (exit code, output, errors) of a command in a child; `at` is called in the child.
PRELUDE = """
import json, os, random, signal, sys, tempfile, time
from pathlib import Path
import torch, transformers, eckart
from eckart import _cli
from eckart._cli import main

# Whatever started the tests may have signals ignored, as a shell does for what it runs in the background.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
    signal.signal(getattr(signal, name), handler)
sys.stdout, said = sys.stderr, sys.stdout
eckart.inspect("dense")  # what the children need is imported now
eckart.compress("dense", recipe="svd", keep=0.9)
sys.stdout = said

def start(*argv, at=lambda: None):
    files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for number, file in enumerate(files, 1):
                os.dup2(file.fileno(), number)
            at()
            sys.argv = ["eckart", *argv]
            main()
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code or 0)
    return child, files

def finish(child, files):
    status = os.waitpid(child, 0)[1]
    for file in files:
        file.seek(0)
    code = os.waitstatus_to_exitcode(status)
    return code, *(file.read().decode() for file in files)

def run(*argv, at=lambda: None):
    return finish(*start(*argv, at=at))

def left():
    return sorted(str(path) for path in Path().rglob("*") if "partial" in path.name or "lock" in path.name
                  or "decompositions" in path.name)
"""


@pytest.fixture(autouse=True)
def usual_signals():
    """Handlers as of a program in a terminal, however the tests were started."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from eckart.testing import tiny_model, tiny_tokenizer

    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    tiny_model("Llama", **options, num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("A killed run resumes where it was and ends with the same bytes. " * 60)
    return tmp_path


def in_one_process(folder, script):
    """What a script says in JSON, run after the prelude in `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout.splitlines()[-1])


COMPRESS = (
    '"compress", "dense", "--recipe", "duo-svd", "--keep", "0.7", "--data", "text.txt", "--windows", "4", '
    '"--length", "16"'
)


@pytest.mark.slow
def test_kills_at_random_moments(folder):
    """Six of them, seeded; after each two the run that is left alone ends as if nothing had been."""
    script = f"""
        import shutil
        begun = time.perf_counter()
        assert run({COMPRESS}, "--work", "other", "--out", "whole")[0] == 0
        seconds, draw, ends = time.perf_counter() - begun, random.Random(0), []
        for turn, polite in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)):
            argv = ({COMPRESS}, "--work", f"work-{{turn}}", "--out", "killed")
            for number, least, most in ((signal.SIGKILL, 0.1, 0.9), (polite, 0.02, 0.3)):
                before = left()
                child, files = start(*argv)
                time.sleep(draw.uniform(least, most) * seconds)
                os.kill(child, number)
                code, _, errors = finish(child, files)
                ends.append([int(number), code, errors, sorted({{*left()}} - {{*before}})])
                if Path("killed").exists():  # it was quicker
                    shutil.rmtree("killed")
            last = run(*argv)
            assert last[0] == 0, last
            for path in Path("whole").iterdir():
                if path.name != "provenance.json":  # which names the folders
                    assert (Path("killed") / path.name).read_bytes() == path.read_bytes(), path
            shutil.rmtree("killed")
        print(json.dumps([ends, left()]))
    """
    ends, left = in_one_process(folder, script)
    assert left == []
    assert sum(code != 0 for _, code, _, _ in ends) >= 4
    for number, code, errors, remains in ends:
        if number != signal.SIGKILL and code != 0:
            assert code == 128 + number
            assert errors.startswith("eckart: interrupted")
            assert errors.count("\n") == 1
            assert remains == []


@pytest.mark.slow
def test_pairs_of_runs(folder):
    """Both of one work folder end well, with the same bytes; of two on one output one is told, and one ends well."""
    script = f"""
        two = [start({COMPRESS}, "--work", "work", "--out", out) for out in ("one", "two")]
        shared = [finish(*one) for one in two]
        same = all((Path("two") / path.name).read_bytes() == path.read_bytes() for path in Path("one").iterdir()
                   if path.name != "provenance.json")
        two = [start({COMPRESS}, "--work", "work", "--out", "three") for _ in "ab"]
        output = [finish(*one) for one in two]
        cached = [start({COMPRESS}, "--out", out) for out in ("four", "five")]
        cached = [finish(*one) for one in cached]
        print(json.dumps([shared, same, output, cached, left()]))
    """
    shared, same, output, cached, left = in_one_process(folder, script)
    assert [code for code, _, _ in shared] == [0, 0], shared
    assert same
    codes = sorted(code for code, _, _ in output)
    assert codes[0] == 0
    assert codes[1] == 2
    assert all(errors.count("\n") == 1 for code, _, errors in output if code == 2)
    assert [code for code, _, _ in cached] == [0, 0], cached
    assert left == []


@pytest.mark.slow
def test_the_ways_out(folder):
    """One process, one child for each: signals, outputs that are closed, full, or of another encoding."""
    (folder / "work").mkdir()
    (folder / "work/piece").write_text("kept")
    (folder / "empty").mkdir()
    (folder / "gone").mkdir()
    script = """
        import contextlib
        import eckart._cli.compress

        def interrupted_by(number):
            def at():
                def compress(*args, **options):
                    Path("partial-of-it").touch()
                    try:
                        os.kill(os.getpid(), number)
                        time.sleep(10)
                    finally:
                        Path("partial-of-it").unlink()
                eckart.compress = compress
            return at

        def early():
            from typer.core import TyperGroup
            TyperGroup.parse_args = lambda self, context, args: os.kill(os.getpid(), signal.SIGTERM)

        def raising(error):
            def at():
                def inspect(*args, **options):
                    raise error
                eckart.inspect = inspect
            return at

        def onto(path, stream=1):
            def at():
                file = os.open(path, os.O_WRONLY)
                os.dup2(file, stream)
            return at

        def closed(stream):
            def at():
                os.close(stream)
                setattr(sys, ("stdin", "stdout", "stderr")[stream], None)
            return at

        def reader_gone():
            ends = os.pipe()
            os.dup2(ends[1], 1)
            os.close(ends[0])
            os.close(ends[1])

        def gone():
            os.chdir("gone")
            os.rmdir(".." + "/gone")

        def ascii_only():
            for name in ("stdout", "stderr"):
                getattr(sys, name).reconfigure(encoding="ascii", errors="strict")

        compress = ("compress", "dense", "--out", "o", "--data", "text.txt")
        inspect = ("inspect", "dense")
        said = {
            "SIGINT": run(*compress, at=interrupted_by(signal.SIGINT)),
            "SIGTERM": run(*compress, at=interrupted_by(signal.SIGTERM)),
            "SIGHUP": run(*compress, at=interrupted_by(signal.SIGHUP)),
            "before it began": run(*compress, at=early),
            "work": run(*compress, "--work", "work", at=interrupted_by(signal.SIGINT)),
            "no work yet": run(*compress, "--work", "empty", at=interrupted_by(signal.SIGINT)),
            "end of file": run(*inspect, at=raising(EOFError("Ran out of input"))),
            "system": run(*inspect, at=raising(PermissionError(13, "Permission denied", "/a/b"))),
            "full": run(*inspect, at=onto("/dev/full")),
            "full help": run("--help", at=onto("/dev/full")),
            "full json": run(*inspect, "--json", at=onto("/dev/full")),
            "full stderr": run("inspect", "nowhere/at/all", at=onto("/dev/full", 2)),
            "no reader": run(*inspect, at=reader_gone),
            "no reader json": run(*inspect, "--json", at=reader_gone),
            "no reader version": run("--version", at=reader_gone),
            "no reader help": run("--help", at=reader_gone),
            "closed": run(*inspect, at=closed(1)),
            "closed json": run(*inspect, "--json", at=closed(1)),
            "closed stderr": run("inspect", "nowhere/at/all", at=closed(2)),
            "ascii": run("inspect", "nowhere/é", at=ascii_only),
            "gone": run(*inspect, at=gone),
            "markup": run("compress", "dense", "--recipe", "svd", "--out", "o[/x]\\x1b[31m"),
            "markup in an error": run("inspect", "no[/x]\\x1b[31m\\nwhere"),
        }
        print(json.dumps([said, left()]))
    """
    said, left = in_one_process(folder, script)
    assert left == []

    def check(name, code, errors):
        assert said[name][0] == code, said[name]
        assert said[name][2] == errors, said[name]

    check("SIGINT", 130, "eckart: interrupted; nothing was written.\n")
    check("SIGTERM", 143, "eckart: interrupted by SIGTERM; nothing was written.\n")
    check("before it began", 143, "eckart: interrupted by SIGTERM; nothing was written.\n")
    check("SIGHUP", 129, "eckart: interrupted by SIGHUP; nothing was written.\n")
    kept = "finished pieces are kept in work: run the same command again to go on."
    check("work", 130, f"eckart: interrupted; {kept}\n")
    check("no work yet", 130, "eckart: interrupted; nothing was written.\n")
    check(
        "end of file",
        1,
        "eckart: a file ends before what it should hold; it is empty or cut off. -vv says where.\n",
    )
    check("system", 1, "eckart: /a/b: Permission denied. -vv says where.\n")
    for name in ("full", "full json"):
        check(name, 1, "eckart: standard output: No space left on device.\n")
    assert said["full help"][0] == 1
    assert said["full help"][2].count("\n") == 1
    check("full stderr", 2, "")
    for name in ("no reader", "no reader json", "no reader version"):
        check(name, 141, "")
    assert said["no reader help"][0] in (1, 141)
    assert said["no reader help"][2] == ""
    for name in ("closed", "closed json"):
        check(name, 0, "")
    check("closed stderr", 2, "")
    assert said["ascii"][0] == 2
    assert r"nowhere/\xe9" in said["ascii"][2]
    check("gone", 2, "eckart: the working folder is gone; change to one that exists.\n")
    assert said["markup"][0] == 0, said["markup"]
    assert r"Checkpoint: o[/x]\x1b[31m" in said["markup"][1]
    assert (folder / "o[/x]\x1b[31m/config.json").exists()
    assert said["markup in an error"][0] == 2
    assert r"no[/x]\x1b[31m\nwhere" in said["markup in an error"][2]
    assert said["markup in an error"][2].count("\n") == 1
    assert "Traceback" not in json.dumps(said)


def test_a_signal_raises_where_the_work_is_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM") as caught, stoppable():
        signal.raise_signal(signal.SIGTERM)
    assert isinstance(caught.value, KeyboardInterrupt)  # what libraries know
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ends, now = [], [0.0]
    monkeypatch.setattr(signals.os, "_exit", ends.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with stoppable():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # of the same moment
        assert ends == []
        signal.raise_signal(signal.SIGINT)
        now[0] = 5.0
        signal.raise_signal(signal.SIGTERM)
    assert ends == [130, 143]


def test_another_thread_may_run_a_command(monkeypatch, capsys):
    codes = []

    def work():
        try:
            main()
        except SystemExit as end:
            codes.append(end.code)

    monkeypatch.setattr(sys, "argv", ["eckart", "--version"])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]


def test_what_the_demo_has_saved_is_said(tmp_path, monkeypatch):
    app = importlib.import_module("eckart._cli.app")
    context = SimpleNamespace(info_name="demo", params={"out": tmp_path / "out"})
    monkeypatch.setattr(app._Running, "context", context)
    assert app.kept() == "nothing was written."
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").touch()
    assert app.kept() == f"the compressed model is in {tmp_path / 'out'}, whole; what was to follow is missing."


def test_a_stream_that_breaks_stops_nothing(monkeypatch):
    class Broken:
        encoding = None

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(sys, "stdout", Broken())
    stream = streams.Stream("stdout")
    assert stream.write("abc") == 3
    assert stream.write("abc") == 3
    assert isinstance(stream.error, BrokenPipeError)
    stream.open()
    stream.flush()
    assert isinstance(stream.error, ValueError)
    assert stream.encoding == "utf-8"


def test_a_stream_that_was_never_there_has_no_number(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(io.UnsupportedOperation, match="fileno"):
        streams.Stream("stdout").fileno()
