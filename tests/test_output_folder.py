"""An output is claimed before any work, appears whole or not at all, and nothing is left of what died."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eckart.errors import OutputError
from eckart.support import files, lock
from eckart.support.files import OutputFolder, check_file, check_new_folder, new_folder, write_text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(folder):
    for name in ("config.json", "a.txt", "provenance.json"):
        (folder / name).write_text(name)
    (folder / "sub").mkdir()
    (folder / "sub/b.txt").write_text("b")


FILLED = ["a.txt", "config.json", "provenance.json", "sub", "sub/b.txt"]


@pytest.mark.parametrize(
    "name", ["new", "deep/er/new", "there", "link", "dangling", "é [x] %s {y}", "n" * 250, "./x/../y"]
)
def test_a_folder_appears_whole(here, name):
    (here / "there").mkdir()
    (here / "target").mkdir()
    (here / "link").symlink_to("target")
    (here / "dangling").symlink_to("made/by/us")
    with new_folder(name) as partial:
        fill(partial)
        assert not (here / name).exists() or "config.json" not in os.listdir(name)
    assert tree((here / name).resolve()) == FILLED
    assert not [entry for entry in tree(here) if "partial" in entry or "lock" in entry]
    for link in ("link", "dangling"):
        assert (here / link).is_symlink()


def test_the_working_folder_can_be_the_output(here):
    with new_folder(".") as partial:
        fill(partial)
    assert tree(Path()) == FILLED  # by the name under which this process is in it


def test_the_home_folder_has_its_short_name(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    with new_folder("~/new") as partial:
        fill(partial)
    write_text(Path("~/page.html"), "page")
    assert tree(here) == sorted(["home", "home/new", "home/page.html", *(f"home/new/{name}" for name in FILLED)])


def test_an_output_within_the_model_folder_leaves_the_model_as_it_is(here):
    (here / "model").mkdir()
    fill(here / "model")
    with new_folder("model/small") as partial:
        fill(partial)
    assert tree(here / "model") == sorted([*FILLED, "small", *(f"small/{name}" for name in FILLED)])
    with pytest.raises(OutputError, match="model: exists and is not empty"):
        OutputFolder("model")


def test_a_folder_that_was_there_keeps_its_rights(here):
    (here / "out").mkdir(mode=0o750)
    before = (here / "out").stat()
    with new_folder("out") as partial:
        fill(partial)
    after = (here / "out").stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file", "is a file; name a folder"),
        ("file/new", "a file is in the way"),
        ("file/deep/new", "a file is in the way"),
        ("full", "exists and is not empty"),
        ("link-to-file", "is a file"),
        ("link-to-full", "exists and is not empty"),
        ("n" * 256, "File name too long"),
        ("new/" + "n" * 256, "File name too long"),
        ("n" * 256 + "/new", "File name too long"),
        ("circle", ""),
        ("/dev/null", "is a file"),
        ("/proc/new", "cannot be written"),
        ("a\0b", "null byte"),
        ("~nobody-of-that-name/new", "cannot be written"),
    ],
)
def test_what_cannot_be_is_told_when_it_is_opened(here, name, said):
    (here / "file").write_text("mine")
    (here / "full").mkdir()
    (here / "full/file").write_text("mine")
    (here / "link-to-file").symlink_to("file")
    (here / "link-to-full").symlink_to("full")
    (here / "circle").symlink_to("circle")
    before = tree(here)
    with pytest.raises(OutputError) as caught:
        OutputFolder(name)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)
    assert tree(here) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written_or_searched(here):
    for mode in (0o500, 0o600, 0o000):
        (here / "closed").mkdir(exist_ok=True)
        (here / "closed").chmod(mode)
        try:
            with pytest.raises(OutputError, match="Permission denied"):
                OutputFolder("closed/new")
        finally:
            (here / "closed").chmod(0o700)


def test_a_file_system_that_is_read_only(here, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="out: cannot be written: Read-only file system"):
        OutputFolder("out")
    monkeypatch.undo()
    assert tree(here) == []


def test_a_working_folder_that_is_gone(here, monkeypatch):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    with pytest.raises(OutputError, match="out: cannot be written: No such file or directory"):
        OutputFolder("out")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left"), ZeroDivisionError])
def test_nothing_is_left_of_a_failure(here, there, error):
    if there:
        (here / "deep/out").mkdir(parents=True)
    before = tree(here)

    def work():
        with new_folder("deep/out") as partial:
            fill(partial)
            raise error

    with pytest.raises((KeyboardInterrupt, OutputError, ZeroDivisionError)):
        work()
    assert tree(here) == before


def test_a_failure_while_the_entries_move_takes_them_back(here, monkeypatch):
    (here / "out").mkdir()
    rename, moved = os.rename, []

    def fail_third(source, target):
        moved.append(Path(target).name)
        if len(moved) == 3:
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_third)
    with pytest.raises(OutputError, match="broken"), new_folder("out") as partial:
        fill(partial)
    assert tree(here) == ["out"]
    assert "config.json" not in moved[:3]


def test_the_configuration_moves_last(here, monkeypatch):
    (here / "out").mkdir()
    rename, moved = os.rename, []
    monkeypatch.setattr(os, "rename", lambda source, target: (moved.append(Path(target).name), rename(source, target)))
    with new_folder("out") as partial:
        fill(partial)
    assert moved[-2:] == ["provenance.json", "config.json"]


def test_a_stranger_who_fills_the_folder_meanwhile_loses_nothing(here):
    with OutputFolder("one") as one, OutputFolder("two") as two:
        for output in (one, two):
            fill(output.partial)
            output.path.mkdir()
        (here / "one/mine").write_text("mine")
        (here / "two/config.json").write_text("mine")
        one.finish()
        with pytest.raises(OutputError, match=r"two: while this ran, config\.json came there"):
            two.finish()
    assert tree(here / "one") == sorted(["mine", *FILLED])
    assert tree(here / "two") == ["config.json"]
    assert (here / "two/config.json").read_text() == "mine"


def test_the_second_on_one_output_is_told_who_writes_it(here):
    for name in ("new", "there"):
        (here / "there").mkdir(exist_ok=True)
        with OutputFolder(name) as first:
            with pytest.raises(OutputError, match=rf"{name}: another run writes it \(pid {os.getpid()} on .*since"):
                OutputFolder(name)
            with pytest.raises(OutputError, match="another run writes it"):
                check_new_folder(here / name)
            fill(first.partial)
            first.finish()
        assert tree(here / name) == FILLED


def test_an_output_claimed_early_is_given_on(here):
    with OutputFolder("out") as output:
        assert Path(output) == here / "out"
        with new_folder(output) as partial:
            fill(partial)
    assert tree(here) == ["out", *(f"out/{name}" for name in FILLED)]
    with pytest.raises(OutputError), OutputFolder("out"):
        pass
    assert tree(here / "out") == FILLED


CLAIM = """
import sys, time
from pathlib import Path
from eckart.support.files import OutputFolder, partial_file
with OutputFolder(sys.argv[1]) as output, partial_file(Path("page.html")) as page:
    (output.partial / "half").write_text("x" * 1000)
    page.write_text("half")
    print("claimed", flush=True)
    time.sleep(60)
"""


def claim(name):
    child = subprocess.Popen([sys.executable, "-c", CLAIM, name], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "claimed\n"
    return child


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_run_left_is_swept_by_the_next(here, there):
    if there:
        (here / "out").mkdir()
    child = claim("out")
    with pytest.raises(OutputError, match=f"pid {child.pid} "):
        OutputFolder("out")
    write_text(Path("page.html"), "whole")  # beside the half one of a living process
    assert len([name for name in tree(here) if "page.html.partial-" in name]) == 1
    child.kill()
    child.wait()
    assert any("half" in name for name in tree(here))
    with new_folder("out") as partial:
        fill(partial)
    write_text(Path("page.html"), "again")
    assert tree(here) == sorted(["out", "page.html", *(f"out/{name}" for name in FILLED)])


def test_partial_folders_of_the_living_and_of_others_stay(here):
    with OutputFolder("other") as other, OutputFolder("out.partial-") as like:
        with new_folder("out") as partial:
            fill(partial)
        assert other.partial.is_dir()
        assert like.partial.is_dir()


def test_without_locks_nothing_is_swept(here, monkeypatch):
    child = claim("out")
    child.kill()
    child.wait()
    monkeypatch.setattr(lock, "_flock", lambda handle: False)  # as on some network file systems
    with new_folder("out") as partial:
        fill(partial)
    assert tree(here / "out") == FILLED
    assert any("partial" in name for name in tree(here))


def test_a_lock_that_its_holder_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Opened before, locked after the holder let go: that file is no longer the one that others see."""
    first, flock = lock.take(tmp_path / "x"), lock._flock

    def late(handle):
        first.release()
        return flock(handle)

    monkeypatch.setattr(lock, "_flock", late)
    second = lock.take(tmp_path / "x")
    monkeypatch.undo()
    assert (tmp_path / "x").exists()
    assert lock.take(tmp_path / "x") is None
    second.release()
    assert not (tmp_path / "x").exists()


def test_concurrent_writers_of_one_file_each_write_it_whole(tmp_path):
    script = """
import sys
from pathlib import Path
from eckart.support.files import write_text
for _ in range(40):
    write_text(Path(sys.argv[1]), sys.argv[2] * 5000)
"""
    page = tmp_path / "page.html"
    children = [subprocess.Popen([sys.executable, "-c", script, str(page), letter]) for letter in "ab"]
    seen = set()
    while any(child.poll() is None for child in children):
        if page.exists():
            seen.add(page.read_text())
        time.sleep(0.001)
    assert [child.returncode for child in children] == [0, 0]
    assert seen <= {"a" * 5000, "b" * 5000}
    assert tree(tmp_path) == ["page.html"]


@pytest.mark.parametrize("name", ["folder", "/dev/null", "file/page.html", "n" * 256, "new/" + "n" * 256, "a\0b"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(here, name):
    (here / "folder").mkdir()
    (here / "file").write_text("mine")
    before = tree(here)
    for check in (check_file, lambda path: write_text(path, "text")):
        with pytest.raises(OutputError) as caught:
            check(Path(name))
        assert str(caught.value).startswith(f"{name}: ")
    assert [entry for entry in tree(here) if entry != "new"] == before


def test_a_file_that_can_be_written_leaves_nothing_when_it_is_checked(here):
    (here / "old.html").write_text("old")
    (here / "link.html").symlink_to("old.html")
    for name in ("new.html", "deep/er/new.html", "old.html", "link.html"):
        check_file(Path(name))
    assert tree(here) == ["link.html", "old.html"]
    write_text(Path("link.html"), "half a surrogate: \udc80")
    assert (here / "link.html").is_symlink()
    assert (here / "old.html").read_text() == r"half a surrogate: \udc80"


def test_a_second_process_need_not_wait_for_signals_to_claim(here):
    """A terminated process leaves nothing, without handlers of ours: what it held is swept by the next."""
    child = claim("out")
    child.send_signal(signal.SIGTERM)
    child.wait()
    check_new_folder("out")
    write_text(Path("page.html"), "again")
    assert tree(here) == ["page.html"]


def test_space_is_asked_of_the_disk_below(here):
    files.check_space(Path("deep/er/out"), 1)
    with OutputFolder("claimed") as output, pytest.raises(OutputError, match=r"claimed: .*MB free"):
        files.check_space(output, 10**18)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="newer Python says that there is no file of such a name")
def test_space_on_no_disk_is_of_the_output(here):
    with pytest.raises(OutputError, match=r"x: cannot be written: File name too long; name another place\.$"):
        files.check_space(Path("x" * 300), 1)


def test_a_lock_that_cannot_be_had_is_an_error_and_leaves_no_file_open(here, monkeypatch):
    def broken(handle, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(OSError, match="Input/output error"):
        lock.take(here / "x")
    assert before in (None, len(os.listdir("/proc/self/fd")))
