"""Chats in a table become the text that the model's own template makes of them, and the recipe says so."""

import json
import logging
import re

import datasets
import pytest
from tables import write

from eckart.errors import DataError
from eckart.text.data import load_windows
from eckart.tiny import tiny_tokenizer

MESSAGES = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Like this."}]
SHAREGPT = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "Like this."}]
RENDERED = "user: How?\nassistant: Like this.\n"  # by the tiny tokenizer's template


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(path, tokenizer=None, column="", **options):
    """All of a table as the tokenizer gives it back, which knows no newline, and the recipe of the source."""
    tokenizer = tokenizer or tiny_tokenizer()
    options = {"bos": "none", "join": "|", **options}
    made = load_windows(f"{path}{column}", tokenizer, windows=None, length=1, **options)
    return tokenizer.decode(made.ids.flatten()).replace("<unk>", "\n"), made.recipe.parts[0]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("column", "chat"),
    [
        ("messages", MESSAGES),
        ("conversations", SHAREGPT),
        ("conversations", MESSAGES),
        ("messages", SHAREGPT),
        ("dialogue", MESSAGES),
    ],
)
def test_a_chat_is_rendered_by_the_template(tmp_path, ending, column, chat):
    path = write(tmp_path / f"chat.{ending}", [{"id": f"conv_{i:06d}", "turns": 2, column: chat} for i in range(2)])
    text, part = text_of(path)
    assert text == RENDERED + "|" + RENDERED
    assert (part.column, part.rendering, part.documents) == (column, "chat template", 2)


def test_chats_of_a_corpus_of_the_hub(monkeypatch):
    rows = [{"id": "a", "messages": MESSAGES}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    text, part = text_of("owner/name")
    assert (text, part.column) == (RENDERED, "messages")


def test_without_a_template_roles_and_text(tmp_path, caplog):
    path = write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    text, part = text_of(path, tokenizer_with(None))
    assert text == "user: How?\nassistant: Like this."
    assert part.rendering == "roles and text"
    assert "no chat template" in caplog.text


def test_the_column_taken_is_logged(tmp_path, caplog):
    path = write(tmp_path / "chat.jsonl", [{"id": "a", "messages": MESSAGES}])
    with caplog.at_level(logging.INFO, "eckart"):
        text_of(path)
    assert "the text is column 'messages', by chat template" in caplog.text


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "user: a\nb\n"),
        ([{"role": "user", "content": ["a", "b"]}], "user: a\nb\n"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "assistant: \n"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "assistant: \n"),
        ([{"from": "system", "value": "s"}, {"from": "tool", "value": "t"}], "system: s\ntool: t\n"),
        ([{"from": "user", "value": "u"}, {"from": "chatgpt", "value": "a"}], "user: u\nassistant: a\n"),
        ([{"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"}], "assistant: f\ntool: o\n"),
        ([{"role": "user", "content": ""}], "user: \n"),
    ],
)
def test_how_messages_are_read(tmp_path, chat, said):
    assert text_of(write(tmp_path / "chat.jsonl", [{"messages": chat}]))[0] == said


def test_what_else_a_message_holds_reaches_the_template(tmp_path):
    template = "{{ messages[0].name }}{% for call in messages[0].tool_calls %}({{ call.function.name }}){% endfor %}"
    chat = [{"role": "assistant", "name": "n", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    for ending in ("jsonl", "parquet"):
        path = write(tmp_path / f"chat.{ending}", [{"messages": chat}])
        assert text_of(path, tokenizer_with(template))[0] == "n(f)"


TOOL = {"type": "function", "function": {"name": "weather", "description": None}}
TOOLS_TEMPLATE = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ messages[0].content }}"


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "string"])
def test_tools_reach_the_template(tmp_path, ending, tools):
    rows = [{"messages": MESSAGES, "tools": tools}, {"messages": MESSAGES, "tools": None}]
    path = write(tmp_path / f"chat.{ending}", rows)
    assert text_of(path, tokenizer_with(TOOLS_TEMPLATE))[0] == "[weather]How?|How?"


@pytest.mark.parametrize("tools", ["none", "{}x", 3, ["f"], {"name": "f"}, '{"name": "f"}'])
def test_tools_that_are_none(tmp_path, tools):
    path = write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}, {"messages": MESSAGES, "tools": tools}])
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} line 2: 'tools'"):
        text_of(path)


def test_rows_without_a_chat_are_passed_over(tmp_path):
    rows = [{"messages": None}, {"messages": []}, {"id": "x"}, {"messages": MESSAGES}, {"messages": None}]
    for ending in ("jsonl", "json"):
        text, part = text_of(write(tmp_path / f"chat.{ending}", rows))
        assert (text, part.documents) == (RENDERED, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "line 2: 'messages' is 'hello', but must be a chat: a list of objects with 'role' and 'content'"),
        ([1], "line 2: 'messages' is [1], but must be a chat"),
        ([{"role": "user"}], "line 2: 'messages' is [{'role': 'user'}], but must be a chat"),
        ([{"role": "user", "content": 5}], "line 2: 'messages', message 1, says 5, but must say a string or a list"),
        (
            [*MESSAGES, {"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "line 2: 'messages', message 3, has a part of type 'image', but only parts of text can be read",
        ),
        ([{"role": "user", "content": [7]}], "line 2: 'messages', message 1, has a part of type 7"),
        ([{"role": "user", "content": [{"type": "text"}]}], "line 2: 'messages', message 1, has a part of type 'text'"),
        ([{"from": "human", "value": {}}], "line 2: 'messages', message 1, says {}, but must say a string"),
    ],
)
def test_a_row_that_is_no_chat_is_named(tmp_path, value, message):
    path = write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}, {"messages": value}])
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        text_of(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["", ":messages"])
def test_a_first_row_that_is_no_chat_is_named(tmp_path, column):
    path = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user"}]}, {"messages": MESSAGES}])
    with pytest.raises(DataError, match=re.escape("line 1: 'messages' is [{'role': 'user'}], but must be a chat")):
        text_of(path, column=column)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
        ("{{ messages[9].content + 'x' }}", ""),
        ("{% for m in messages %}", ""),
        ("{{ 1 / 0 }}", ""),
        ({"other": "x"}, ""),
    ],
)
def test_a_template_that_refuses_names_the_row(tmp_path, template, said):
    path = write(tmp_path / "chat.jsonl", [{}, {"messages": MESSAGES}])
    with pytest.raises(DataError, match=f"line 2: 'messages': the chat template refuses it: {said}") as caught:
        text_of(path, tokenizer_with(template))
    assert "\n" not in str(caught.value)


WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("bos", "expected"),
    [
        ("none", "How?</s>Like this.</s>|How?</s>Like this.</s>"),
        ("start", "<s>How?</s>Like this.</s>|How?</s>Like this.</s>"),
    ],
)
def test_the_template_brings_no_second_bos(tmp_path, bos, expected):
    path = write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}] * 2)
    assert text_of(path, tokenizer_with(WITH_BOS), bos=bos)[0] == expected


def test_each_window_has_one_bos(tmp_path):
    path = write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}] * 40)
    ids = load_windows(str(path), tokenizer_with(WITH_BOS), windows=None, length=8, bos="window").ids
    assert (ids[:, 0] == 1).all()
    assert not (ids[:, 1:] == 1).any()


def test_a_template_that_writes_the_date_gives_the_same_windows_every_day(tmp_path):
    path = write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    date = "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }}"
    template = date + ": {{ messages[0].content }}"
    assert text_of(path, tokenizer_with(template))[0] == "26 Jul 2024: How?"


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_chats_are_drawn_by_a_seed(tmp_path, ending):
    rows = [{"messages": [{"role": "user", "content": chr(65 + i % 26) * 40}]} for i in range(200)]
    path = write(tmp_path / f"chat.{ending}", rows)
    options = {"windows": 2, "length": 20}
    one, same, other = (load_windows(str(path), tiny_tokenizer(), seed=seed, **options) for seed in (1, 1, 2))
    assert one.recipe == same.recipe
    assert one.recipe.tokens_hash != other.recipe.tokens_hash
    assert one.recipe.parts[0].documents < 100
    assert one.recipe.parts[0].reading == "drawn rows"


def test_half_an_emoji_in_a_chat(tmp_path, caplog):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a\\ud83db"}]}\n')
    assert text_of(path)[0] == "user: a\nb\n"
    assert "line 1: half a character" in caplog.text
