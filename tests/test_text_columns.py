"""Which column of a table is its text: taken where it is plain, refused by name where it would be a guess."""

import logging
import re

import datasets
import pytest
from tables import write

from eckart.errors import DataError
from eckart.text.data import load_windows
from eckart.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "chat"}]
ONLY = "its only column of strings,"
ENDINGS = ("jsonl", "json", "parquet")


def taken(path, column=""):
    """The text of a table, and the column that the recipe names."""
    tokenizer = tiny_tokenizer()
    made = load_windows(f"{path}{column}", tokenizer, windows=None, length=1, bos="none", join="|")
    return tokenizer.decode(made.ids.flatten()), made.recipe.parts[0].column


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "i", "text": "good", "messages": CHAT, "tags": ["t"]}, "text"),
        ({"id": "i", "prompt": "p", "messages": CHAT, "tags": ["t"]}, "messages"),
        ({"conversations": CHAT, "messages": CHAT}, "messages"),
        ({"conversations": CHAT, "chosen": CHAT}, "conversations"),
        ({"id": "i", "dialogue": CHAT, "languages": ["en"]}, "dialogue"),
        ({"body": "good", "stars": 4, "used": True}, "body"),
        ({"text": "good", "text_id": "x"}, "text"),
        ({"text": None, "messages": CHAT}, "messages"),
        ({"tools": CHAT, "n": 1}, "tools"),
    ],
)
def test_a_column_that_is_plain(tmp_path, ending, row, column):
    path = write(tmp_path / f"rows.{ending}", [row])
    assert taken(path) == ("user: chat<unk>" if row[column] == CHAT else "good", column)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "i", "turns": [["a", "b"]]}, f"{ONLY} 'id', stands beside lists or objects (turns)"),
        ({"body": "b", "tags": ["t"]}, f"{ONLY} 'body', stands beside lists or objects (tags)"),
        ({"body": "b", "empty": []}, f"{ONLY} 'body', stands beside lists or objects (empty)"),
        ({"body": "b", "meta": {"a": 1}}, f"{ONLY} 'body', stands beside lists or objects (meta)"),
        ({"name": "b", "tools": [{"f": 1}]}, f"{ONLY} 'name', stands beside lists or objects (tools)"),
        ({"body": "b", "messages": None}, f"{ONLY} 'body', stands beside lists or objects (messages)"),
        ({"id": "i", "n": 1}, f"{ONLY} 'id', is named like a label"),
        ({"conversation_id": "i"}, f"{ONLY} 'conversation_id', is named like a label"),
        ({"tools": '[{"name": "f"}]', "n": 1}, f"{ONLY} 'tools', is named like a label"),
        ({"url": "i"}, f"{ONLY} 'url', is named like a label"),
        ({"messages": '[{"role": "user"}]'}, f"{ONLY} 'messages', is named like a label"),
        ({"chosen": CHAT, "rejected": CHAT}, "2 columns of chats (chosen, rejected)"),
        ({"a": "x", "b": "y"}, "2 columns of strings"),
        ({"people": [{"role": "boss", "age": 3}]}, "0 columns of strings"),
        ({"text": ["a", "b"]}, "0 columns of strings"),
    ],
)
def test_a_column_that_would_be_a_guess_is_refused(tmp_path, ending, row, message):
    path = write(tmp_path / f"rows.{ending}", [row])
    expected = f"{path}: has no column 'text' and {message}; choose one by name, {path}:COLUMN. Its columns are "
    with pytest.raises(DataError, match=f"^{re.escape(expected)}"):
        taken(path)


def test_the_fix_for_a_corpus_of_the_hub_has_its_fields(monkeypatch):
    rows = [{"a": "x", "b": "y"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    with pytest.raises(DataError, match=re.escape("choose one by name, owner/name::dev:COLUMN. Its columns are a, b.")):
        load_windows("owner/name::dev", tiny_tokenizer(), windows=1, length=1)
    made = load_windows("owner/name:::b", tiny_tokenizer(), windows=1, length=1)
    assert (made.recipe.parts[0].source, made.recipe.parts[0].column) == ("owner/name:::b", "b")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("row", "column", "text"),
    [
        ({"id": "i", "messages": CHAT}, "messages", "user: chat<unk>"),
        ({"id": "i", "messages": CHAT}, "id", "i"),
        ({"meta": {"body": "in", "n": 1}}, "meta.body", "in"),
        ({"a": {"b": {"c": "deep"}}}, "a.b.c", "deep"),
        ({"a": {"chat": CHAT}}, "a.chat", "user: chat<unk>"),
        ({"a.b": "literal", "a": {"b": "nested"}}, "a.b", "literal"),
        ({"meta.json": "named like a file"}, "meta.json", "named like a file"),
        ({"a:b": "colon"}, "a:b", "colon"),
    ],
)
def test_a_column_by_name(tmp_path, ending, row, column, text):
    path = write(tmp_path / f"rows.{ending}", [row])
    made = load_windows(f"{path}:{column}:1", tiny_tokenizer(), windows=None, length=1)
    assert made.recipe.parts[0].source == f"{path}:{column}"
    assert taken(path, f":{column}") == (text, column)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("column", ["z", "meta", "meta.n", "meta.z", "list", "n"])
def test_a_column_by_name_that_will_not_do(tmp_path, ending, column):
    path = write(tmp_path / f"rows.{ending}", [{"text": "a", "meta": {"n": 1, "body": "b"}, "list": ["a"], "n": 2}])
    has = f"{path}: has no column '{column}' of strings or chats; its columns are text, meta.n, meta.body, list, n."
    with pytest.raises(DataError, match=f"^{re.escape(has)}$"):
        taken(path, f":{column}")


def test_a_path_through_what_is_no_object(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": {"b": "x"}}, {"a": [1]}])
    with pytest.raises(DataError, match=re.escape(f"{path} line 2: 'a.b' leads through [1], which is no object.")):
        taken(path, ":a.b")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("column", ["", ":text"])
def test_first_rows_without_a_value(tmp_path, ending, column):
    rows = [{"text": None, "id": "i"}] * 3 + [{"text": "good", "id": "i"}, {"text": None, "id": "i"}]
    assert taken(write(tmp_path / f"rows.{ending}", rows), column) == ("good", "text")
    late = [{"text": None, "n": 1}] * 300 + [{"text": "good", "n": 1}]
    assert taken(write(tmp_path / f"late.{ending}", late), column) == ("good", "text")


def test_a_first_row_without_the_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"n": 1}, {}, {"body": "good"}, {"n": 2}])
    assert taken(path) == ("good", "body")


def test_a_column_without_any_value(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": None}] * 3)
    with pytest.raises(DataError, match="is empty; give a text"):
        taken(path)


@pytest.mark.parametrize("value", [4, True, 0.5, ["a"], {"a": 1}, CHAT])
@pytest.mark.parametrize(("ending", "place"), [("jsonl", "line 2"), ("json", "row 2")])
def test_a_later_row_of_another_kind_is_named(tmp_path, value, ending, place):
    path = write(tmp_path / f"rows.{ending}", [{"text": "a"}, {"text": value}])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} {place}: 'text' is .*, but must be a string.$"):
        taken(path)


def test_names_of_columns_are_escaped(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a\n\x1b[31m": "x", "b": "y"}])
    with pytest.raises(DataError, match=re.escape(r"'a\n\x1b[31m', b")) as caught:
        taken(path)
    assert str(caught.value).isprintable()


def test_the_column_taken_is_logged(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [{"body": "good"}])
    with caplog.at_level(logging.INFO, "eckart"):
        taken(path)
    assert "the text is column 'body', as it is" in caplog.text
