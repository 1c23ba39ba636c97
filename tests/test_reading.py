"""The one door for files that are parsed: a checked value comes out, or one line that says why not."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from eckart.errors import OptionError, PlanError
from eckart.support import reading
from eckart.support.escaping import plain


def refused(path: Path, read: Any = reading.read_json) -> str:
    with pytest.raises(PlanError) as caught:
        read(path, PlanError, "plan file")
    said = str(caught.value)
    assert said.isprintable()
    assert said.startswith(plain(path, 1000))
    return said


def test_plain_data_come_back_as_they_were_written(tmp_path: Path) -> None:
    path, value = tmp_path / "a.json", {"a": [1, 2.5, None, True, "é"], "b": {}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode())
    assert reading.read_json(path, PlanError) == value
    path.write_text('{"a": "Infinity", "b": -Infinity, "c": ["text"]}')
    assert reading.read_json(path, PlanError) == {"a": float("inf"), "b": float("-inf"), "c": ["text"]}
    path.write_bytes(b"\xef\xbb\xbfa = 1\nb = [1, 2]\n")
    assert reading.read_toml(path, PlanError) == {"a": 1, "b": [1, 2]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read as JSON: Expecting value: line 1 column 1"),
        (b'{"a": 1,\n "b" 2}', "line 2 column 6"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        (b"[" * 100_000, "nested more than 100 levels deep"),
        (b"[" * 101 + b"[]" + b"]" * 101, "nested more than 100 levels deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 100 levels deep"),
        (b'{"a": ' + b"9" * 6000 + b"}", "a number of more than 4,300 digits"),
    ],
)
def test_what_is_no_json(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert words in refused(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a = \n", "at line 1"),
        ("a = " + "[" * 100_000, "nested more than 100 levels deep"),
        (".".join("a" * 300) + " = 1", "nested more than 100 levels deep"),
        ("a = " + "9" * 6000, "a number of more than 4,300 digits"),
        ("a = 1979-13-45", "cannot be read as TOML"),
        ("a = 1\na = 2", "cannot be read as TOML"),
    ],
)
def test_what_is_no_toml(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.toml").write_text(content)
    assert words in refused(tmp_path / "a.toml", reading.read_toml)


def test_a_hundred_levels_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100 + "]" * 100)
    assert reading.read_json(tmp_path / "a.json", PlanError) is not None


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("{}")
    assert "is a folder" in refused(tmp_path)
    assert "is a pipe or a device" in refused(tmp_path / "pipe")  # and nobody waits for who writes into it
    assert "is a pipe or a device" in refused(Path("/dev/null"))
    assert "no such plan file" in refused(tmp_path / "none")
    assert "no such plan file" in refused(tmp_path / "link")
    assert "no such plan file" in refused(tmp_path / "file" / "inside")
    assert "no such plan file" in refused(tmp_path / "with\0nul")
    assert "no such plan file" in refused(tmp_path / "half \ud800 of a pair")
    assert "cannot be read" in refused(tmp_path / "loop")
    assert "cannot be read: File name too long" in refused(tmp_path / ("long" * 100))
    assert "no such plan file" in refused(tmp_path / "two\nlines \x1b[2J")
    monkeypatch.setattr(reading, "LARGEST", 1)
    assert "has 2 bytes" in refused(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "file").chmod(0)
    assert "cannot be read: Permission denied" in refused(tmp_path / "file")


def test_a_failure_below_is_told_by_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "cannot be read: Permission denied" in refused(tmp_path / "file")


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    rank: reading.Count
    names: Annotated[list[str], msgspec.Meta(min_length=1)] = []
    kind: Literal["x", "y"] = "x"
    share: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    pair: tuple[int, float] = (1, 1.0)

    def __post_init__(self) -> None:
        if self.rank == 13:
            raise ValueError("rank is 13, which is unlucky")


class Outer(msgspec.Struct):
    entries: list[Inner] = []
    by_name: dict[str, Inner] = {}
    free: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "f: must hold a JSON object."),
        (None, "f: must hold a JSON object."),
        ({"entries": 3}, "f: entries is 3, but it must be a list."),
        ({"entries": [{"rank": 1}, 3]}, "f: entries[1] is 3, but it must be an object."),
        ({"entries": [{}]}, "f: entries[0] has no 'rank'."),
        ({"entries": [{"rank": "1"}]}, "f: entries[0].rank is '1', but it must be a whole number."),
        ({"entries": [{"rank": True}]}, "f: entries[0].rank is True, but it must be a whole number."),
        ({"entries": [{"rank": 1.5}]}, "f: entries[0].rank is 1.5, but it must be a whole number."),
        ({"entries": [{"rank": -1}]}, "f: entries[0].rank is -1, but it must be at least 0."),
        ({"entries": [{"rank": 13}]}, "f: entries[0]: rank is 13, which is unlucky."),
        ({"entries": [{"rank": 1, "names": []}]}, "f: entries[0].names is [], but its length must be at least 1."),
        ({"entries": [{"rank": 1, "names": ["a", [1]]}]}, "f: entries[0].names[1] is [1], but it must be text."),
        ({"entries": [{"rank": 1, "kind": "z"}]}, "f: entries[0].kind is 'z', which is none of its values."),
        ({"entries": [{"rank": 1, "share": 0}]}, "f: entries[0].share is 0, but it must be more than 0.0."),
        ({"entries": [{"rank": 1, "pair": [1]}]}, "f: entries[0].pair has 1 items, but it must have 2."),
        ({"entries": [{"rank": 1, "ranq\n": 2}]}, r"f: entries[0]: unknown key 'ranq\n'."),
        ({"by_name": {"q": {"rank": "1"}}}, "f: by_name[...].rank is text, but it must be a whole number."),
        ({"by_name": {"q": {}}}, "f: by_name[...] has no 'rank'."),
        ({"\ud800": 3}, "f: holds half of a surrogate pair among its keys."),
        ({"free": 3}, "f: free is 3, but it must be an object."),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(data: Any, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        reading.checked(data, Outer, OptionError, "f")
    assert str(caught.value) == words


def test_numbers_beyond_a_type_are_told_without_their_digits() -> None:
    for number in (10**400, -(10**400), 16**6000):
        for key in ("rank", "share"):
            with pytest.raises(OptionError, match=rf"entries\[0\]\.{key} is ") as caught:
                reading.checked({"entries": [{"rank": 1, key: number}]}, Outer, OptionError, "f")
            assert len(str(caught.value)) < 200


def test_what_fits_is_made_and_the_rest_is_left_alone() -> None:
    made = reading.checked(
        {"entries": [{"rank": 2, "share": 3}], "more": 1, "free": {"a": 10**400}}, Outer, OptionError, "f"
    )
    assert made == Outer([Inner(2, share=3.0)], {}, {"a": 10**400})


def test_text_in_messages_is_one_harmless_line() -> None:
    assert plain("a layer") == "a layer"
    assert plain(Path("Größe/漢.json")) == "Größe/漢.json"
    assert plain("a\nb\tc\x1b[2J\x9b\u202e\u2028\ud800") == r"a\nb\tc\x1b[2J\x9b\u202e\u2028\ud800"
    assert plain("x" * 300) == "x" * 300
    assert plain("x" * 301) == "x" * 296 + " ..."
    assert len(plain("\x1b" * 1000, 50)) == 50
    assert plain(16**6000) == "(int of too many digits)"
    assert plain(3) == "3"
