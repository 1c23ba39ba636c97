"""Work that survives: damage is found and made again, one run holds a folder, and the dead hold nothing."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eckart.errors import OutputError
from eckart.support import lock, work
from eckart.support.files import OutputFolder
from eckart.support.work import Journal, Key, WorkFolder, opened

KEY = Key("stage", a=1)
ROWS = [{"group": f"layer {n}", "share": 0.5, "rank": None, "kl": 0.1 * n} for n in range(6)]


@pytest.fixture(autouse=True)
def seen(caplog):
    caplog.set_level(logging.WARNING, "eckart")
    return caplog


def pieces(folder):
    found = WorkFolder(folder, KEY)
    found.write("one", {"w": torch.arange(64.0)}, {"loss": 0.25, "steps": [1, 2]})
    return found


def test_every_flipped_bit_of_a_piece_is_found(tmp_path, caplog):
    found = pieces(tmp_path)
    for path in sorted(found.folder.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            caplog.clear()
            record = found.find("one")
            if record is not None:  # a space is no part of what was written
                assert torch.equal(record[0]["w"], torch.arange(64.0))
                assert record[1] == {"loss": 0.25, "steps": [1, 2]}
            else:
                assert "piece one is damaged" in caplog.text
                assert str(found.folder) in caplog.text
                assert "made again" in caplog.text
        path.write_bytes(whole)
    assert found.find("one") is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "one.safetensors").unlink(),
        lambda folder: (folder / "one.safetensors").write_bytes(b""),
        lambda folder: (folder / "one.json").write_text(""),
        lambda folder: (folder / "one.json").write_text("[" * 100_000),
        lambda folder: (folder / "one.json").write_text('{"tensors": 1, "notes": {}}'),  # as version 0.1 wrote it
        lambda folder: (folder / "one.json").write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "one.json").write_text((folder / "two.json").read_text()),
        lambda folder: os.replace(folder / "two.safetensors", folder / "one.safetensors"),
    ],
)
def test_a_damaged_piece_is_made_again(tmp_path, damage):
    found = pieces(tmp_path)
    found.write("two", {"w": torch.ones(64)}, {"loss": 0.5})
    damage(found.folder)
    assert found.find("one") is None
    found.write("one", {"w": torch.arange(64.0)}, {"loss": 0.25})
    assert found.find("one")[1] == {"loss": 0.25}


def test_a_piece_of_another_key_is_none_of_ours(tmp_path):
    found, other = pieces(tmp_path), WorkFolder(tmp_path, Key("stage", a=2))
    os.rename(found.folder, other.folder)
    assert other.find("one") is None


def journal(folder, rows=ROWS):
    made = Journal(folder, KEY)
    for row in rows:
        made.add(row)
    return made.path


def test_every_flipped_bit_of_a_journal_is_found(tmp_path, caplog):
    path = journal(tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        caplog.clear()
        rows = Journal(tmp_path, KEY).rows
        assert all(row in ROWS for row in rows)
        assert len(rows) >= len(ROWS) - 2  # a flipped line break damages two
        assert rows == ROWS or "measured again" in caplog.text
        assert str(path) in caplog.text or rows == ROWS
        caplog.clear()
        assert Journal(tmp_path, KEY).rows == rows
        assert caplog.text == ""  # it was said once
    path.write_bytes(whole)
    assert Journal(tmp_path, KEY).rows == ROWS


def test_a_damaged_first_line_costs_no_row(tmp_path, caplog):
    path = journal(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("1", "2"), *lines[1:]]))
    assert Journal(tmp_path, KEY).rows == ROWS
    assert path.read_text().splitlines(keepends=True) == lines


def test_a_torn_last_line_is_dropped_without_a_word(tmp_path, caplog):
    path = journal(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    torn = Journal(tmp_path, KEY)
    assert torn.rows == ROWS[:-1]
    torn.add(ROWS[-1])
    assert path.read_bytes() == whole
    assert caplog.text == ""


def old_journal(folder):
    """As version 0.1 wrote it: lines without checksums."""
    path = folder / f"{KEY.name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [KEY.facts, *ROWS[:3]]))
    return path


def test_journals_of_version_0_1_are_read(tmp_path, caplog):
    path = old_journal(tmp_path)
    read = Journal(tmp_path, KEY)
    assert read.rows == ROWS[:3]
    before = path.read_bytes()
    for row in ROWS[3:]:
        read.add(row)
    assert path.read_bytes().startswith(before)
    assert Journal(tmp_path, KEY).rows == ROWS
    assert caplog.text == ""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "broken\n", *lines[3:5], lines[5].replace("layer 4", "layer 1"), lines[6]]))
    assert Journal(tmp_path, KEY).rows == [ROWS[0], ROWS[2], ROWS[3], ROWS[5]]
    assert "2 damaged lines" in caplog.text


def test_an_old_journal_with_another_first_line_is_begun_anew(tmp_path):
    path = old_journal(tmp_path)
    path.write_text(path.read_text().replace('"a": 1', '"a": 3'))
    assert Journal(tmp_path, KEY).rows == []
    assert Journal(tmp_path, KEY).rows == []


@pytest.mark.parametrize(
    "text", ["", "\n", "{", "[]\n", "7\n{}\n", "\xff\n", "[" * 100_000 + "\n", '{"a": ' + "9" * 6000 + "}\n"]
)
def test_a_journal_that_is_none_is_begun_anew(tmp_path, text):
    (tmp_path / f"{KEY.name}.jsonl").write_text(text, encoding="latin-1")
    made = Journal(tmp_path, KEY)
    assert made.rows == []
    made.add(ROWS[0])
    assert Journal(tmp_path, KEY).rows == ROWS[:1]


def test_rows_that_are_no_measurements_are_measured_again(tmp_path):
    """Of an old journal a row may be JSON still and yet damaged."""
    from eckart.measuring.sensitivity import _is_measurement

    assert all(_is_measurement(row) for row in ROWS)
    for key, value in (("group", 1), ("share", "0.5"), ("kl", None), ("kl", [1])):
        assert not _is_measurement({**ROWS[0], key: value})
        assert not _is_measurement({name: kept for name, kept in ROWS[0].items() if name != key})


ADD = """
import os, sys
from pathlib import Path
from eckart.support.work import Journal, Key
for who in "abc":
    if os.fork() == 0:
        journal = Journal(Path(sys.argv[1]), Key("stage", a=1))
        for n in range(15):
            journal.add({"who": who, "n": n, "long": who * 3000})
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in range(3)))
"""


@pytest.mark.slow
def test_three_processes_add_to_one_journal(tmp_path, caplog):
    subprocess.run([sys.executable, "-c", ADD, str(tmp_path)], check=True)
    rows = Journal(tmp_path, KEY).rows
    assert sorted((row["who"], row["n"]) for row in rows) == [(who, n) for who in "abc" for n in range(15)]
    assert caplog.text == ""
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.name}.jsonl"]


HOLD = """
import sys, time
from pathlib import Path
from eckart.support import lock
held = lock.wait(Path(sys.argv[1]) / ".lock")
half = Path(sys.argv[1]) / "decompositions-dead"
half.mkdir()
(half / "x.safetensors").write_text("half")
(Path(sys.argv[1]) / ".old.jsonl.partial-0123abcd").write_text("half")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(folder, seconds):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def test_the_second_run_waits_and_says_for_whom(tmp_path, caplog):
    child = hold(tmp_path, 0.5)
    start = time.monotonic()
    with opened(tmp_path) as scratch:
        assert time.monotonic() - start > 0.3
        assert scratch.parent == tmp_path
    child.wait()
    assert f"in use by another run (pid {child.pid} on " in caplog.text
    assert "since 20" in caplog.text
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_dead_hold_nothing_and_leave_nothing(tmp_path, caplog):
    child = hold(tmp_path, 60)
    child.kill()
    child.wait()
    with opened(tmp_path) as scratch:
        assert [path for path in tmp_path.iterdir() if path != scratch] == [tmp_path / ".lock"]
        kept = pieces(tmp_path)
    assert caplog.text == ""
    assert [path.name for path in tmp_path.iterdir()] == [kept.folder.name]


def test_who_waits_can_be_interrupted(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    held = lock.take(tmp_path / ".lock")
    monkeypatch.setattr(lock.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path):
        pass
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_run_is_its_own(tmp_path):
    """Not one of the work folder, which it only went through."""
    with pytest.raises(FileNotFoundError), opened(tmp_path / "work"):
        (tmp_path / "nowhere").read_text()
    assert list((tmp_path / "work").iterdir()) == []


def test_without_a_work_folder_there_is_none():
    with opened(None) as scratch:
        assert scratch is None


@pytest.mark.parametrize(
    ("name", "said"), [("file", "in the way"), ("file/work", "in the way"), ("n" * 300, "too long")]
)
def test_a_work_folder_that_cannot_be_is_told_at_once(tmp_path, name, said):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=said), opened(tmp_path / name):
        pass


def test_work_and_output_within_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for inside in ("out", "out/work", "./out/../out/deep/work"):
        with (
            OutputFolder("out") as output,
            pytest.raises(OutputError, match="lies in the output folder"),
            opened(inside, output),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
    with OutputFolder("work/out") as output, opened("work", output):
        (output.partial / "config.json").write_text("{}")
        output.finish()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]


def test_a_short_name_of_the_home_folder_is_one_for_work_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with opened("~/work") as scratch:
        assert scratch.parent == tmp_path / "work"
    assert WorkFolder("~/work", KEY).folder.parent == tmp_path / "work"
    assert Journal(Path("~/work"), KEY).path.parent == tmp_path / "work"


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "file"))
    made = Journal(work.cache_folder() / "work", KEY)
    assert "going on without it" in caplog.text
    made.add(ROWS[0])
    assert made.rows == ROWS[:1]
    assert len(caplog.records) == 1
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "another"))
    with pytest.raises(OutputError, match="in the way"):  # a folder that was asked for
        Journal(tmp_path / "file/work", KEY)


def test_a_cache_that_gets_full_is_done_without(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path))
    made = Journal(work.cache_folder() / "work", KEY)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(work.os, "fsync", full)
    for row in ROWS:
        made.add(row)
    assert made.rows == ROWS
    assert len(caplog.records) == 1


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "ECKART_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert work.cache_folder().name == "eckart-cache"


def test_a_piece_that_cannot_be_written_is_of_the_output(tmp_path):
    folder = WorkFolder(tmp_path / "work", KEY)
    folder.folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder.folder, ignore_errors=True)
    folder.folder.write_text("a file in its place")
    with pytest.raises(
        OutputError, match=r"piece\.safetensors: cannot be written: a file is in the way; name another place\.$"
    ):
        folder.write("piece", {"x": torch.zeros(2)}, {})
