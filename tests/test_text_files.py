"""Any file may be named as text: it is read, or refused in one line that names the place; nothing hangs."""

import json
import os
import random
import re
import sys
import time

import pytest

from eckart.errors import DataError
from eckart.text.data import load_windows, parse_spec
from eckart.tiny import tiny_tokenizer

BOM = b"\xef\xbb\xbf"


def text_of(spec, **options):
    """The whole text of a spec, as the tokenizer gives it back."""
    tokenizer = tiny_tokenizer()
    made = load_windows(str(spec), tokenizer, **{"windows": None, "length": 1, "bos": "none", "join": "|", **options})
    return tokenizer.decode(made.ids.flatten())


def refused(spec, message, **options):
    """Reading it raises one clear line that matches."""
    with pytest.raises(DataError, match=message) as caught:
        text_of(spec, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "text"),
        ("a.TXT", "text"),
        ("a.jsonl", '{"text": "text"}\n'),
        ("a.jsonl", '{"text": "text"}'),
        ("a.jsonl", '\r\n{"text": "text"}\r\n\r\n'),
        ("a.JSONL", '{"text": "text"}\n'),
        ("a.json", '{"text": "text"}\n'),
        ("a.json", '\n{"text": "text"}\n{"text": null}\n'),
        ("a.json", '[{"text": "text"}]'),
        ("a.json", '\n [\n {\n "text": "text"\n }\n , {"text": null}\n]\n'),
    ],
)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "mark"])
@pytest.mark.parametrize("options", [{}, {"windows": 2}, {"windows": 2, "seed": 1}], ids=["all", "first", "drawn"])
def test_a_byte_order_mark_and_the_layout_of_json_do_not_matter(tmp_path, name, content, mark, options):
    path = tmp_path / name
    path.write_bytes(mark + content.encode())
    text = text_of(path, **options)
    assert text == "text" if not options else len(text) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    path = tmp_path / name
    mark = "\ufeff" if encoding.endswith("e") else ""
    path.write_bytes((mark + '{"text": "text"}\n').encode(encoding))
    kind = encoding[:6].upper()
    refused(path, f"^{re.escape(str(path))}: is {kind} text by its byte-order mark; save it as UTF-8.$")
    path.write_bytes('{"text": "text"}\n'.encode("utf-16-le"))
    refused(path, r"holds a NUL \((line 1, )?byte 1\)")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\ncd\xff", r": is not UTF-8 text \(line 2, byte 5\); save it as UTF-8.$"),
        ("a.txt", b"ab\n\xed\xa0\x80", r": is not UTF-8 text \(line 2, byte 3\)"),
        ("a.txt", b"ab\n\xc3", r": is not UTF-8 text \(line 2, byte 3\)"),
        ("a.txt", b"ab\n\0", r": holds a NUL \(line 2, byte 3\); it may be binary, or UTF-16; save it as UTF-8"),
        ("a.txt", bytes(1000), r": holds a NUL \(line 1, byte 0\)"),
        ("a.jsonl", bytes(1000), r" line 1: holds a NUL \(byte 0\)"),
        ("a.json", bytes(1000), r" line 1: holds a NUL \(byte 0\)"),
        ("a.json", b"[" + bytes(1000), r": holds a NUL \(line 1, byte 1\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe4"}', r" line 2: is not UTF-8 text \(byte 24\); save it as UTF-8.$"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xe4"}]', r": is not UTF-8 text \(line 2, byte 26\)"),
        (
            "a.jsonl",
            b'[{"text": "a"}]',
            r": begins with a list, but a .jsonl holds one object a line, .* name it .json.$",
        ),
        ("a.jsonl", b'\n[\n{"text": "a"}]', r": begins with a list"),
        (
            "a.jsonl",
            b'{\n "text": "a"\n}\n',
            r" line 1: is not JSON: .* one line, or name a list of rows .json.$",
        ),
        ("a.json", b'{\n "text": "a"\n}\n', r" line 1: is not JSON: .* A row must stand on one line.$"),
        ("a.jsonl", b'{"text": "a"}\n"a"\n', r' line 2: is not an object such as {"text": "..."}.$'),
        ("a.jsonl", b'{"text": "a"}{"text": "b"}\n', r" line 1: is not JSON: Extra data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": NaN}\n', r" line 2: 'text' is nan, but must be a string.$"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 6000 + b"}\n", r" line 1: holds a number of too many digits"),
        ("a.json", b'[{"text": "a", "n": ' + b"1" * 6000 + b"}]", r" row 1: holds a number of too many digits"),
        ("a.jsonl", b"[" * 100_000, r": begins with a list"),
        ("a.json", b"[" * 100_000, r" row 1: is JSON nested too deeply to be read; take it out.$"),
        ("a.jsonl", b'{"a":' * 100_000, r" line 1: is JSON nested too deeply"),
        ("a.json", b'[{"text": "a", "n": ' + b"[" * 100_000, r" row 1: is JSON nested too deeply"),
        ("a.json", b'[{"text": "a"},', r" row 2: is not JSON: Expecting value.$"),
        (
            "a.json",
            b'[{"text": "a"}',
            r" row 1: is not JSON: the file ends where a comma or the end of the list must stand.$",
        ),
        (
            "a.json",
            b'[{"text": "a"} {"text": "b"}]',
            r" row 1: is not JSON: '{' follows where a comma or the end of the list must",
        ),
        ("a.json", b'[{"text": "a"}] x', r": is not JSON: more stands behind the end of the list, after row 1.$"),
        ("a.json", b'[{"text": "a"}, 5]', r" row 2: is not an object such as"),
        ("a.json", b'[{"text": "a"}, {"text": "b]', r" row 2: is not JSON: Unterminated string"),
        ("a.json", b'[{"text": "a"}, {"text": oops}]' + b" " * 100, r" row 2: is not JSON: Expecting value.$"),
        ("a.txt", b"", r": is empty; give a text.$"),
        ("a.txt", BOM, r": is empty; give a text.$"),
        ("a.jsonl", b"", r": is empty; give a text.$"),
        ("a.jsonl", BOM + b"\n \n", r": is empty; give a text.$"),
        ("a.json", b" ", r": is empty; give a text.$"),
        ("a.json", b"[ ]", r": is empty; give a text.$"),
        ("a.jsonl", b"{}\n{}\n", r": has no column 'text' and 0 columns of strings"),
        ("a.parquet", b"", r": cannot be read as parquet: "),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", r": cannot be read as parquet: "),
        ("a.csv", b"text\na\n", r": the name of a file must end in .txt, .jsonl, .json, .parquet.$"),
        (
            "a.jsonl.gz",
            b"\x1f\x8b",
            r": the name of a file must end in .txt, .jsonl, .json, .parquet; unpack it first.$",
        ),
        ("a", b"text", r": the name of a file must end in"),
    ],
)
def test_what_a_file_may_hold(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    for options in ({}, {"windows": 1}, {"windows": 1, "seed": 1}):
        refused(path, f"^{re.escape(str(path))}{message}", **options)


def test_numbers_that_no_column_is_made_of_do_not_matter(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "score": NaN, "far": -Infinity, "n": ' + "1" * 4000 + ', "x": 1e999}\n')
    assert text_of(path) == "a"


def test_half_characters_are_replaced_and_counted(tmp_path, caplog):
    rows = ['{"text": "fine"}', '{"text": "a\\ud83d"}', '{"text": "\\udc00b"}', '{"text": "\\ud83d\\ude00"}']
    for name, content in (("a.jsonl", "\n".join(rows)), ("a.json", f"[{','.join(rows)}]")):
        (tmp_path / name).write_text(content)
        caplog.clear()
        assert text_of(tmp_path / name) == "fine|a<unk>|<unk>b|<unk>"
        (said,) = caplog.messages
        assert said.endswith(" 2: half a character stands as U+FFFD (rows with one: 2)")


def test_half_characters_in_names(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"\\ud83d": "a", "\\udc00": "b"}')
    refused(path, r"Its columns are '\\ud83d', '\\udc00'")


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl", "pipe.json", "pipe.parquet", "pipe"])
def test_a_pipe_does_not_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    start = time.perf_counter()
    refused(tmp_path / name, "is a pipe or a device, not a file; write its text to a file and name that.$")
    (tmp_path / "link.txt").symlink_to(tmp_path / name)
    refused(tmp_path / "link.txt", "is a pipe or a device")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "/dev/urandom"])
def test_a_device_is_refused(tmp_path, name):
    (tmp_path / "device.txt").symlink_to(name)
    refused(tmp_path / "device.txt", "is a pipe or a device")
    refused(name, "is a pipe or a device")


def test_standard_input_is_refused():
    reading, writing = os.pipe()
    try:
        refused(f"/dev/fd/{reading}", "is a pipe or a device, not a file; write its text to a file and name that.$")
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_a_folder_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    refused(tmp_path / name, ": cannot be read: it is a folder; name a file in it.$")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="needs another user to be")
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_a_file_of_somebody_else(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "a"}')
    path.chmod(0)
    import pyarrow.parquet  # noqa: F401  before this user may be unable to

    os.seteuid(65534)
    try:
        refused(path, "(cannot be read|cannot be read as parquet): .*Permission denied")
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "a\0b.txt", "none/a.jsonl", "~nobody-at-all/a.txt", "\ud800.txt"])
def test_a_name_that_cannot_be(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        text_of(name)
    assert "\n" not in str(caught.value)


def test_a_link_to_nowhere(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere.txt")
    refused(f"owner/name:1,{tmp_path}/a.txt:1", "no such file or corpus")  # before the hub is asked
    refused(tmp_path / "a.txt", "no such file or corpus")


@pytest.mark.parametrize(
    ("name", "after", "column", "windows"),
    [
        ("a,b.txt", "", "", None),
        ("a,b.txt", ":7", "", 7),
        ("a, b, c.jsonl", ":body:7", "body", 7),
        ("a:b.txt", ":7", "", 7),
        ("a:7.txt", "", "", None),
        ("wikitext2,self.json", "", "", None),
        ("rows.jsonl:x.json", ":y", "y", None),
        ("a.txt,b.txt", "", "", None),
        ("[a,b].txt", "", "", None),
        (",.txt", "", "", None),
    ],
)
def test_the_name_of_a_file_that_exists_wins(tmp_path, monkeypatch, name, after, column, windows):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("text")
    (spec,) = parse_spec(name + after)
    assert (spec.kind, spec.name, spec.column, spec.windows) == ("file", name, column, windows)
    first, second, third = parse_spec(f"wikitext2:3,{name}{after},c4:4")
    assert (first.name, second.name, third.name) == ("wikitext2", name, "c4")


def test_a_column_named_like_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    (spec,) = parse_spec("rows.jsonl:meta.json:3")
    assert (spec.name, spec.column, spec.windows) == ("rows.jsonl", "meta.json", 3)


def test_a_comma_in_the_name_of_a_file_that_is_missing(tmp_path):
    (tmp_path / "a,b.txt").write_text("text " * 10)
    assert text_of(tmp_path / "a,b.txt") == "text " * 10
    spec = f"{tmp_path}/c,d.txt:1"
    refused(
        spec, f"^d.txt: no such file or corpus. It is a part of '{spec}', where commas stand between sources. Known: "
    )


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "row"}')
    assert text_of("~/a.txt,~/b.jsonl") == "textrow"
    refused("~/c.txt", "~/c.txt: no such file or corpus")


def sound_files():
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Like \u00e9 \U0001f600 this."}]
    rows = [{"text": f"row {i} é 🙂", "n": i, "meta": {"a": [1.5, None, True]}} for i in range(4)]
    chats = [{"id": f"c{i}", "messages": chat, "tools": []} for i in range(4)]
    return {
        "a.txt": "A text\nof two lines é 🙂\r\n".encode() * 4,
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "chat.jsonl": BOM + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats).encode(),
        "a.json": json.dumps(rows, indent=1).encode(),
        "chat.json": json.dumps(chats).encode(),
    }


SPLICES = [
    *(b"\0", b"\xff", b"\xed\xa0\x80", BOM, b"\xff\xfe", b"[" * 3000, b"}", b'"', b"\\ud83d", b"\\u12", b"NaN", b"-"),
    *(
        b"1" * 5000,
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"\n",
        b"\r",
        b",",
        b":",
        b"1e999",
        b'"role"',
        b"\xe2\x80\xa8",
        b"<s>",
    ),
]


def mutate(data, chance):
    """The bytes with one to three of them flipped, cut out, doubled or put in from elsewhere."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + chance.randrange(12)]
        elif kind == 3:
            data[at:at] = data[at // 2 : at]
        else:
            data[at : at + chance.randrange(3)] = chance.choice(SPLICES)
    return bytes(data)


def outcome(path, tokenizer, options):
    """What the refusal says; empty if the file is read."""
    try:
        load_windows(str(path), tokenizer, length=4, **options)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted(sound_files()))
def test_files_that_were_damaged(tmp_path, name):
    """Each is read or refused in one line; nothing else escapes."""
    chance, sound, tokenizer = random.Random(name), sound_files()[name], tiny_tokenizer()
    path, outcomes = tmp_path / name, {"read": 0, "refused": 0}
    for _ in range(120):
        path.write_bytes(mutate(sound, chance))
        for options in ({"windows": None}, {"windows": 2, "seed": 1}):
            said = outcome(path, tokenizer, options)
            assert len(said.splitlines()) <= 1
            outcomes["refused" if said else "read"] += 1
    assert min(outcomes.values()) > 5


def test_a_tokenizer_that_fails_is_told_in_one_line():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = "x"  # as an edited tokenizer_config.json may say
    with pytest.raises(DataError, match=r"the tokenizer \(\w+\) fails on the text: .*its files may be damaged"):
        load_windows("python-docs", tokenizer, windows=1, length=16)
