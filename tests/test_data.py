"""Specs are parsed, texts become the windows that plain slicing gives, and every mistake is named."""

import dataclasses
import hashlib
import json
import logging
import re
import struct
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.errors import DataError, NumericalError, OptionError
from eckart.text.data import AMPLE, SourceSpec, hash_tokens, load_windows, parse_spec, share_windows
from eckart.text.fit import check_positions

BOS, EOS = 100, 101


def make_tokenizer(template=None, bos_token="<s>"):
    """Words `w0` to `w99` have the ids 0 to 99; `template` is what surrounds a text, such as `<s> $A </s>`."""
    vocabulary = {f"w{i}": i for i in range(100)} | {"<s>": BOS, "</s>": EOS}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos_token, eos_token="</s>")


def words(numbers):
    return " ".join(f"w{number}" for number in numbers)


def numbers(count):
    """A sequence in which every stretch of six differs from every other, so that windows can be told apart."""
    return [(i * 37 + (i // 100) * 11) % 100 for i in range(count)]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def notes(tmp_path):
    """103 tokens of text in a file."""
    path = tmp_path / "notes.txt"
    path.write_text(words(numbers(103)))
    return path


HUB = "hub"


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("wikitext2", [SourceSpec(HUB, "wikitext2")]),
        ("wikitext2:64", [SourceSpec(HUB, "wikitext2", windows=64)]),
        ("c4::validation:", [SourceSpec(HUB, "c4", split="validation")]),
        ("owner/name:config:split:column", [SourceSpec(HUB, "owner/name", "config", "split", "column")]),
        ("owner/name:config:split:column:7", [SourceSpec(HUB, "owner/name", "config", "split", "column", 7)]),
        ("owner/name:::column", [SourceSpec(HUB, "owner/name", column="column")]),
        (
            "owner/name::train[:10%]:text:8",
            [SourceSpec(HUB, "owner/name", split="train[:10%]", column="text", windows=8)],
        ),
        ("notes.txt", [SourceSpec("file", "notes.txt")]),
        ("C:\\texts\\notes.txt:16", [SourceSpec("file", "C:\\texts\\notes.txt", windows=16)]),
        ("rows.jsonl:body", [SourceSpec("file", "rows.jsonl", column="body")]),
        ("a/rows.parquet:body:3", [SourceSpec("file", "a/rows.parquet", column="body", windows=3)]),
        ("rows.json:5", [SourceSpec("file", "rows.json", windows=5)]),
        ("python-docs", [SourceSpec("python-docs", "python-docs")]),
        ("python-docs:second:4", [SourceSpec("python-docs", "python-docs", split="second", windows=4)]),
        ("self:12", [SourceSpec("self", "self", windows=12)]),
        (
            "wikitext2:64, c4:32,notes.txt:16",
            [
                SourceSpec(HUB, "wikitext2", windows=64),
                SourceSpec(HUB, "c4", windows=32),
                SourceSpec("file", "notes.txt", windows=16),
            ],
        ),
    ],
)
def test_a_spec_is_parsed(spec, parts):
    assert parse_spec(spec) == parts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'': a source has no name"),
        ("wikitext2,,c4", "'wikitext2,,c4': a source has no name"),
        ("wikitext2:0", "wikitext2:0: asks for 0 windows; a count must be positive."),
        ("a/b:c:d:e:f", "a/b:c:d:e:f: has 5 fields; a corpus of the hub is name:config:split:column."),
        ("notes.txt:body", "notes.txt:body: a .txt file has no columns; name it without ':body'."),
        ("python-docs:third", "python-docs:third: write python-docs:first, python-docs:second, python-docs:all"),
        ("self:me", "self:me: write python-docs:first"),
    ],
)
def test_a_wrong_spec_is_named(spec, message):
    with pytest.raises(DataError, match=re.escape(message)):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "windows", "counts"),
    [
        ("a/b", None, [None]),
        ("a/b", 5, [5]),
        ("a/b:3", 128, [3]),
        ("a/b,c/d,e/f", 11, [5, 3, 3]),
        ("a/b,c/d", None, [None, None]),
        ("a/b:2,c/d:9", 128, [2, 9]),
    ],
)
def test_windows_are_shared(spec, windows, counts):
    assert share_windows(parse_spec(spec), windows) == counts


@pytest.mark.parametrize(
    ("spec", "windows", "message"),
    [
        ("a/b", 0, "windows is 0, but must be positive"),
        ("a/b:2", -1, "windows is -1, but must be positive"),
        ("a/b:3,c/d", 8, "c/d: has no count, but other sources have; give every source a count, or none."),
        ("a/b,c/d,e/f", 2, "windows is 2, but 3 sources were named; ask for one each at least."),
    ],
)
def test_windows_that_cannot_be_shared_are_named(spec, windows, message):
    with pytest.raises(DataError, match=re.escape(message)):
        share_windows(parse_spec(spec), windows)


def test_windows_come_from_the_start_and_the_tail_is_dropped(tokenizer, notes):
    made = load_windows(str(notes), tokenizer, windows=None, length=10)
    assert made.ids.dtype == torch.int64
    assert made.ids.tolist() == [numbers(103)[start : start + 10] for start in range(0, 100, 10)]
    assert load_windows(str(notes), tokenizer, windows=3, length=10).ids.tolist() == made.ids[:3].tolist()


def test_a_seed_draws_each_window_at_most_once(tokenizer, notes):
    grid = [numbers(103)[start : start + 10] for start in range(0, 100, 10)]
    draws = [load_windows(str(notes), tokenizer, windows=6, length=10, seed=seed).ids.tolist() for seed in range(5)]
    for rows in draws:
        places = [grid.index(row) for row in rows]
        assert len(set(places)) == 6
    assert len({str(rows) for rows in draws}) == 5
    assert draws[3] == load_windows(str(notes), tokenizer, windows=6, length=10, seed=3).ids.tolist()


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        ("<s> $A </s>", "start", [[BOS, *numbers(103)[:9]], numbers(103)[9:19]]),
        ("<s> $A </s>", "none", [numbers(103)[:10], numbers(103)[10:20]]),
        ("<s> $A </s>", "window", [[BOS, *numbers(103)[:9]], [BOS, *numbers(103)[9:18]]]),
        ("$A </s>", "start", [numbers(103)[:10], numbers(103)[10:20]]),
        ("</s> <s> $A", "start", [[EOS, BOS, *numbers(103)[:8]], numbers(103)[8:18]]),
        (None, "start", [numbers(103)[:10], numbers(103)[10:20]]),
        (None, "window", [[BOS, *numbers(103)[:9]], [BOS, *numbers(103)[9:18]]]),
    ],
)
def test_bos_modes(notes, template, bos, expected):
    tokenizer = make_tokenizer(template)
    assert load_windows(str(notes), tokenizer, windows=2, length=10, bos=bos).ids.tolist() == expected
    every = load_windows(str(notes), tokenizer, windows=None, length=10, bos=bos).ids
    assert len(every) == (11 if bos == "window" else 10)  # 103 tokens of text, by nines or by tens
    assert not (every[:, 2:] >= BOS).any(), "a special token got inside"


def test_documents_are_joined(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": words([i, i + 1])}) + "\n" for i in range(0, 20, 2)))
    made = load_windows(str(path), tokenizer, windows=None, length=5)
    assert made.ids.flatten().tolist() == list(range(20))
    joined = load_windows(str(path), tokenizer, windows=None, length=5, join=" w99 ")
    assert joined.ids.flatten().tolist()[:8] == [0, 1, 99, 2, 3, 99, 4, 5]
    assert joined.recipe.join == " w99 "


def test_newlines_are_kept(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("a\r\nb é".encode())
    characters = {character: index for index, character in enumerate("a\r\nb é")}
    inner = Tokenizer(models.WordLevel(characters, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = load_windows(str(path), PreTrainedTokenizerFast(tokenizer_object=inner), windows=1, length=6)
    assert made.ids.tolist() == [[0, 1, 2, 3, 4, 5]]


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"text": "w1 w2\u2028w3", "other": "w9"}, ""),
        ({"body": "w1 w2\u2028w3", "number": 4}, ""),
        ({"text": "w9", "body": "w1 w2\u2028w3"}, ":body"),
    ],
)
def test_the_column_of_a_table(tokenizer, tmp_path, ending, row, column):
    path = tmp_path / f"rows.{ending}"
    empty = dict.fromkeys(row)
    write_table(path, [row, empty, row])
    made = load_windows(f"{path}{column}", tokenizer, windows=1, length=6)
    assert made.ids.tolist() == [[1, 2, 3, 1, 2, 3]]
    assert made.recipe.documents == 2


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"a": "x", "b": "y", "n": 1}, "", "has no column 'text' and 2 columns of strings; choose one by name, "),
        ({"n": 1}, "", "has no column 'text' and 0 columns of strings"),
        ({"a": "x", "n": 1}, ":z", "has no column 'z' of strings or chats; its columns are a, n."),
        ({"a": "x", "n": 1}, ":n", "has no column 'n' of strings or chats; its columns are a, n."),
    ],
)
def test_a_column_that_is_not_there(tokenizer, tmp_path, ending, row, column, message):
    path = tmp_path / f"rows.{ending}"
    write_table(path, [row])
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        load_windows(f"{path}{column}", tokenizer, windows=1, length=2)


def test_no_more_rows_are_read_than_needed(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_table(path, [{"text": words([i % 100] * 50)} for i in range(400)])
    whole = load_windows(str(path), tokenizer, windows=None, length=50)
    first = load_windows(str(path), tokenizer, windows=4, length=50)
    drawn = load_windows(str(path), tokenizer, windows=4, length=50, seed=1)
    assert (whole.recipe.parts[0].reading, whole.recipe.documents) == ("whole", 400)
    assert first.ids.tolist() == [[i] * 50 for i in range(4)]
    assert first.recipe.parts[0].reading == "first rows"
    # 10 rows of 149 characters, then rows of 199, until 32 x 4 x 50 = 6,400 are reached
    assert (AMPLE, first.recipe.documents) == (32, 10 + 25)
    assert drawn.recipe.parts[0].reading == "drawn rows"
    assert drawn.recipe.documents < 100
    assert drawn.ids.max() > 4


def test_text_with_few_tokens_is_read_on(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_table(path, [{"text": f"w{i}" + " " * 500} for i in range(20)])
    made = load_windows(str(path), tokenizer, windows=4, length=5)
    assert made.ids.flatten().tolist() == list(range(20))
    assert made.recipe.documents == 20


def test_a_mixture_gives_its_parts_in_order(tokenizer, notes, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(words([7] * 60))
    counted = load_windows(f"{notes}:2,{other}:1", tokenizer, windows=None, length=10)
    assert counted.ids.tolist() == [numbers(103)[:10], numbers(103)[10:20], [7] * 10]
    assert [(part.source, part.windows) for part in counted.recipe.parts] == [(str(notes), 2), (str(other), 1)]
    shared = load_windows(f"{notes},{other}", tokenizer, windows=3, length=10)
    assert torch.equal(shared.ids, counted.ids)
    assert (shared.recipe.windows, shared.recipe.documents, shared.recipe.split) == (3, 2, "all,all")


def test_python_docs_halves_do_not_meet(tokenizer):
    from pydoc_data.topics import topics

    def load(spec, purpose="calibration"):
        return load_windows(spec, tokenizer, windows=None, length=1, purpose=purpose)

    first, second, whole = load("python-docs:first"), load("python-docs:second"), load("python-docs:all")
    assert torch.equal(load("python-docs").ids, first.ids)
    assert torch.equal(load("python-docs", "evaluation").ids, second.ids)
    assert torch.equal(torch.cat([first.ids, second.ids]), whole.ids)
    assert whole.ids.numel() == len("\n\n".join(topics[name] for name in sorted(topics)).split())
    assert first.recipe.documents + second.recipe.documents == len(topics)
    assert 0.45 < first.ids.numel() / whole.ids.numel() < 0.6
    assert [made.recipe.split for made in (first, second, whole)] == ["first", "second", "all"]


def test_the_recipe_identifies_the_windows(tokenizer, notes):
    made = load_windows(str(notes), tokenizer, windows=2, length=10, seed=5)
    data = struct.pack("<20q", *made.ids.flatten().tolist())
    expected = {
        "spec": str(notes),
        "windows": 2,
        "length": 10,
        "seed": 5,
        "join": "\n\n",
        "bos": "start",
        "split": "all",
        "tokens_hash": hashlib.sha256(b"(2, 10)" + data).hexdigest(),
        "tokens": 20,
        "documents": 1,
        "parts": [
            {
                "source": str(notes),
                "split": "all",
                "reading": "whole",
                "documents": 1,
                "text_tokens": 103,
                "windows": 2,
                "column": "",
                "rendering": "text",
            }
        ],
    }
    assert made.recipe.to_dict() == expected
    assert json.loads(json.dumps(made.recipe.to_dict())) == expected
    assert hash_tokens(made.ids.reshape(4, 5)) != hash_tokens(made.ids)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.recipe.seed = 6


def test_a_long_text_causes_no_warning(tokenizer, notes):
    tokenizer.model_max_length = 20
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.addHandler(handler)
    try:
        load_windows(str(notes), tokenizer, windows=1, length=10)
        assert said == []
        assert logger.level == before
        tokenizer(notes.read_text(), verbose=True)
        assert len(said) == 1, "the warning would have been heard"
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a text."),
        (b" \n\n ", "is empty; give a text."),
        (b"w1 " * 37, "has 37 tokens, but one window needs 512; give more text or a smaller --length."),
        (
            b"w1 " * 6300,
            "has 12 windows of 512 tokens (6,300 tokens), but 32 were asked; "
            "give more text, fewer --windows or a smaller --length.",
        ),
        (b"w1 \xff w2", "is not UTF-8 text (line 1, byte 3); save it as UTF-8."),
    ],
)
def test_a_text_that_will_not_do(tokenizer, tmp_path, content, message):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}$"):
        load_windows(str(path), tokenizer, windows=32, length=512)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", ": is empty; give a text."),
        ("rows.jsonl", '{"text": "w1"}\n\n{"text": }\n', " line 3: is not JSON: Expecting value"),
        ("rows.jsonl", '{"text": "w1"}\n["w1"]\n', ' line 2: is not an object such as {"text": "..."}.'),
        ("rows.jsonl", '{"text": "w1"}\n{"text": 4}\n', " line 2: 'text' is 4, but must be a string."),
        ("rows.json", "[", " row 1: is not JSON: Expecting value"),
        ("rows.json", "[]", ": is empty; give a text."),
        ("rows.json", '"w1"', ' line 1: is not an object such as {"text": "..."}.'),
        ("rows.json", '[{"text": "w1"}, {"text": 4}]', " row 2: 'text' is 4, but must be a string."),
        ("rows.parquet", "not parquet", ": cannot be read as parquet: "),
        ("notes.md", "w1 w2", ": the name of a file must end in .txt, .jsonl, .json, .parquet."),
    ],
)
def test_a_file_that_cannot_be_read(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")) as caught:
        load_windows(str(path), tokenizer, windows=1, length=1)
    assert "\n" not in str(caught.value)


def test_a_folder_named_like_a_text(tokenizer, tmp_path):
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(DataError, match=re.escape(f"{folder}: cannot be read: it is a folder; name a file in it.")):
        load_windows(str(folder), tokenizer, windows=1, length=1)


def test_a_source_that_is_not_there(tokenizer, notes):
    close = notes.with_name("nots.txt")
    hint = f"{close}: no such file or corpus; did you mean {str(notes)!r}? Known: wikitext2, ptb, c4, python-docs, self"
    with pytest.raises(DataError, match=re.escape(hint)):
        load_windows(str(close), tokenizer, windows=1, length=1)
    with pytest.raises(DataError, match=r"wikitxt2: no such file or corpus; did you mean 'wikitext2'\?"):
        load_windows("wikitxt2", tokenizer, windows=1, length=1)
    with pytest.raises(DataError, match=r"/none/q.txt: no such file or corpus. Known: .*, or a file that ends in .txt"):
        load_windows("/none/q.txt", tokenizer, windows=1, length=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 0}, DataError, "length is 0, but a window needs at least 1 token(s); give a larger --length."),
        ({"length": 1, "bos": "window"}, DataError, "length is 1, but a window needs at least 2 token(s)"),
        ({"windows": 0}, DataError, "windows is 0, but must be positive"),
        ({"bos": "both"}, OptionError, "bos is 'both', but must be none, start, window."),
    ],
)
def test_wrong_options(tokenizer, notes, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        load_windows(str(notes), tokenizer, **{"windows": 1, "length": 4, **options})


def test_a_bos_that_the_tokenizer_lacks(notes):
    with pytest.raises(DataError, match="the tokenizer has no BOS token; use bos 'start' or 'none'"):
        load_windows(str(notes), make_tokenizer(bos_token=None), windows=1, length=4, bos="window")


def test_windows_longer_than_the_model_knows(tokenizer, notes):
    made = load_windows(str(notes), tokenizer, windows=1, length=10)
    check_positions(made.recipe.length, tiny_model(max_position_embeddings=10))
    with pytest.raises(DataError, match="windows have 10 tokens, but the model knows 9 positions; give --length 9"):
        check_positions(made.recipe.length, tiny_model(max_position_embeddings=9))


@pytest.mark.parametrize(
    ("spec", "purpose", "called"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train"})),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test"})),
        ("wikitext2::validation", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "validation"})),
        (
            "ptb",
            "evaluation",
            ("ptb-text-only/ptb_text_only", None, {"split": "test", "revision": "refs/convert/parquet"}),
        ),
        (
            "c4",
            "calibration",
            ("allenai/c4", None, {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
        ),
        (
            "c4",
            "evaluation",
            (
                "allenai/c4",
                None,
                {"split": "validation", "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
            ),
        ),
        ("owner/name:config:dev:body", "evaluation", ("owner/name", "config", {"split": "dev"})),
        ("owner/name:::body", "evaluation", ("owner/name", None, {"split": "test"})),
    ],
)
def test_what_is_asked_of_the_hub(tokenizer, monkeypatch, spec, purpose, called):
    calls = []

    def load_dataset(path, config, **options):
        calls.append((path, config, options))
        column = {"ptb": "sentence", "owner/name": "body"}.get(spec.partition(":")[0], "text")
        return datasets.Dataset.from_dict({column: ["w1 w2", "", "w3 w4"], "decoy": ["w9"] * 3})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = load_windows(spec, tokenizer, windows=1, length=4, purpose=purpose)
    assert calls == [called]
    assert made.ids.tolist() == [[1, 2, 3, 4]]
    assert made.recipe.split == called[2]["split"]
    assert made.recipe.parts[0].reading == ("whole" if spec[0] in "wp" else "first rows")


def test_a_local_folder_as_a_corpus(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_table(folder / "train.jsonl", [{"body": "w1 w2", "n": 1}, {"body": "w3 w4", "n": 2}])
    made = load_windows(f"{folder}", tokenizer, windows=1, length=4)
    assert made.ids.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(DataError, match=re.escape(f"{folder}: cannot be loaded: Unknown split")):
        load_windows(f"{folder}", tokenizer, windows=1, length=4, purpose="evaluation")
    with pytest.raises(DataError, match="has no column 'text' of strings or chats; its columns are body, n"):
        load_windows(f"{folder}:::text", tokenizer, windows=1, length=4)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach\nit"),
            "wikitext2: there is no access to the hub from here (Salesforce/wikitext); "
            "use text at hand: a .txt file, python-docs, or self (text the model writes).",
        ),
        (FileNotFoundError("Dataset doesn't exist\nmore"), "The hub says: Dataset doesn't exist"),
        (ValueError("Unknown split\nmore"), "wikitext2: cannot be loaded: Unknown split"),
    ],
)
def test_a_hub_that_does_not_give(tokenizer, monkeypatch, error, message):
    def load_dataset(*_, **__):
        logging.getLogger("huggingface_hub").warning("Retrying")
        raise error

    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    try:
        with pytest.raises(DataError, match=f"{re.escape(message)}$") as caught:
            load_windows("wikitext2", tokenizer, windows=1, length=4)
    finally:
        logger.removeHandler(handler)
    assert "\n" not in str(caught.value)
    assert said == []
    assert logger.level == logging.INFO


def tiny_model(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=110,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **options,
    )
    return LlamaForCausalLM(config)


class Counting(torch.nn.Module):
    """The token at place j is j more than the one before; it keeps no cache, so that it must see the whole row.

    It would rather write `</s>`, or an id that no token has.
    """

    device = torch.device("cpu")
    weight = torch.ones(110, 1)

    def get_input_embeddings(self):
        return self

    def forward(self, input_ids, past_key_values, use_cache):
        logits = torch.full((*input_ids.shape, 110), -1e4)
        step = torch.arange(1, input_ids.shape[1] + 1)
        logits.scatter_(2, ((input_ids + step) % 100)[..., None], 0.0)
        logits[..., [BOS, EOS, 105]] = 1e4
        return SimpleNamespace(logits=logits)


def test_a_model_writes_its_own_text(tokenizer):
    model = Counting().train()
    ids = load_windows("self:20", tokenizer, windows=None, length=8, model=model).ids
    assert ids.tolist() == [[(row[0] + i * (i + 1) // 2) % 100 for i in range(8)] for row in ids.tolist()]
    assert len(set(ids[:, 0].tolist())) > 5
    assert model.training


@pytest.mark.parametrize(
    ("template", "bos", "start"),
    [("<s> $A", "start", BOS), (None, "window", BOS), (None, "start", None), ("<s> $A", "none", None)],
)
def test_how_written_text_starts(template, bos, start):
    made = load_windows("self", make_tokenizer(template), windows=3, length=6, bos=bos, model=tiny_model())
    assert made.ids.shape == (3, 6)
    assert (made.ids[:, 1:] < 100).all()
    assert (made.ids[:, 0] == start).all() if start else (made.ids[:, 0] < 100).all()
    assert made.recipe.parts[0].reading == "written by the model"


def test_written_text_depends_on_the_seed_alone(tokenizer):
    model = tiny_model()

    def write(seed, tokenizer=tokenizer):
        return load_windows("self", tokenizer, windows=18, length=7, seed=seed, model=model).ids

    torch.manual_seed(1)
    once, state = write(3), torch.get_rng_state()
    assert torch.equal(once, write(3))
    assert not torch.equal(once, write(4))
    assert torch.equal(write(None), write(0))
    assert torch.equal(state, torch.get_rng_state())


def test_written_text_needs_a_sound_model_and_a_count(tokenizer):
    with pytest.raises(DataError, match="self: needs the model that writes the text, and none was given"):
        load_windows("self", tokenizer, windows=2, length=4)
    with pytest.raises(DataError, match="self: a model writes without end; say how many windows"):
        load_windows("self", tokenizer, windows=None, length=4, model=tiny_model())
    broken = tiny_model()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="self: the model's logits hold NaN or infinity"):
        load_windows("self", tokenizer, windows=2, length=4, model=broken)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_links_that_lead_nowhere(tokenizer, tmp_path, name):
    path = tmp_path / name
    path.symlink_to(path)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: ") as caught:
        load_windows(str(path), tokenizer, windows=1, length=1)
    assert str(caught.value).isprintable()
