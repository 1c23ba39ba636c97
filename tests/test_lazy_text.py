"""No more is read of a text than its windows need, and what is read gives the windows that the whole would give."""

import json
import time
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eckart.text import files, json_rows, tokens
from eckart.text.data import load_windows


def word_tokenizer():
    """Words w0 to w999 have the ids 0 to 999."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything a thousand times smaller than it is, so that a text of 100 kB is a long one."""
    monkeypatch.setattr(tokens, "SMALL", 4000)
    monkeypatch.setattr(files, "PIECE", 500)
    monkeypatch.setattr(files, "SLACK", 100)


@pytest.fixture
def read(monkeypatch):
    """Counts the bytes that are read of files opened in binary."""
    count = {"bytes": 0}
    opened = Path.open

    def counting(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        of_file = file.read

        class Counting:
            def __getattr__(self, name):
                return getattr(file, name)

            def read(self, *size):
                data = of_file(*size)
                count["bytes"] += len(data)
                return data

            def readline(self):
                return self.count(file.readline())

            def __iter__(self):
                return map(self.count, file)

            def count(self, data):
                count["bytes"] += len(data)
                return data

            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

        return Counting()

    monkeypatch.setattr(Path, "open", counting)
    return count


def words(count, ending=" "):
    return "".join(f"w{(i * 37 + i // 10) % 1000}" + ("\n" if i % 12 == 11 else ending) for i in range(count))


def load(path, **options):
    return load_windows(str(path), word_tokenizer(), **{"windows": 4, "length": 10, "spare": 3, **options})


def test_the_first_windows_of_a_long_text(tmp_path, read):
    path = tmp_path / "long.txt"
    path.write_text(words(20_000))
    whole = load(path, windows=None).ids
    read["bytes"] = 0
    made = load(path)
    assert read["bytes"] < 10_000 < path.stat().st_size
    assert torch.equal(made.ids, whole[:4])
    part = made.recipe.parts[0]
    assert part.reading.startswith("first 4,")
    assert part.reading.endswith(" characters")
    assert part.documents == 1
    assert 500 < part.text_tokens < 1000
    seen = whole[: part.text_tokens // 10]
    for window in made.unseen:
        assert any(torch.equal(window, other) for other in seen[4:])
    assert len(made.tail) == 0


def byte_tokenizer(text):
    """Byte-level pairs as GPT-2 has them, whose spaces and newlines join what comes next."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("piece", range(500, 516))
def test_a_cut_changes_no_token(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(files, "PIECE", piece)
    text = "".join(f"The {i}th line,\n\n   said  so:\t'tis" + "\n" * (i % 4) for i in range(400))
    path = tmp_path / "long.txt"
    path.write_text(text)
    tokenizer = byte_tokenizer(text)
    options = {"length": 1, "spare": 9000}
    whole = load_windows(str(path), tokenizer, windows=None, **options)
    monkeypatch.setattr(tokens, "AMPLE", 0)
    made = load_windows(str(path), tokenizer, windows=1, **options)
    assert made.recipe.parts[0].reading != "whole"
    read = torch.cat([made.ids, made.unseen])
    assert len(read) > 100
    assert torch.equal(read, whole.ids[: len(read)])


def test_unseen_windows_lie_evenly_in_what_was_read(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(words(20_000))
    made, whole = load(path), load(path, windows=None).ids
    count = made.recipe.parts[0].text_tokens // 10
    places = [4 + (2 * i + 1) * (count - 4) // 6 for i in range(3)]
    assert torch.equal(made.unseen, whole[places])


def test_a_small_text_is_read_whole(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text(words(800))
    assert path.stat().st_size <= 4000
    made, whole = load(path), load(path, windows=None).ids
    assert made.recipe.parts[0].reading == "whole"
    assert torch.equal(made.unseen, whole[[4 + (2 * i + 1) * 76 // 6 for i in range(3)]])
    drawn = load(path, seed=5)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn.ids, whole[order[:4]])
    assert drawn.recipe.parts[0].reading == "whole"


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_text_of_just_that_size(tmp_path, more, seed):
    path = tmp_path / "text.txt"
    path.write_text(words(2000)[: 4000 + more])
    made, whole = load(path, seed=seed), load(path, windows=None)
    assert made.recipe.parts[0].text_tokens == whole.recipe.parts[0].text_tokens or more >= 0
    if seed is None:
        assert torch.equal(made.ids, whole.ids[:4])
    if made.recipe.parts[0].reading == "whole":
        assert made.recipe.parts[0].text_tokens == whole.recipe.parts[0].text_tokens


def test_more_windows_read_more(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text(words(20_000))
    few, many = load(path), load(path, windows=100)
    assert many.recipe.parts[0].text_tokens > 4 * few.recipe.parts[0].text_tokens
    assert torch.equal(many.ids[:4], few.ids)


def test_a_text_with_few_tokens_is_read_on(tmp_path):
    path = tmp_path / "spaces.txt"
    path.write_text(" " * 9000 + (" " * 400).join(f"w{i}" for i in range(100)))
    made = load(path, windows=6)
    assert made.ids.flatten().tolist() == list(range(60))
    assert made.recipe.parts[0].reading == "whole"


def test_a_seed_draws_pieces_of_a_long_text(tmp_path, read):
    path = tmp_path / "long.txt"
    path.write_text(words(40_000))
    size = path.stat().st_size
    read["bytes"] = 0
    one = load(path, seed=1)
    assert read["bytes"] < 10_000 < size / 10
    assert one.recipe == load(path, seed=1).recipe
    assert one.recipe.tokens_hash != load(path, seed=2).recipe.tokens_hash
    assert one.recipe.parts[0].reading.startswith("drawn pieces of 4,")
    assert one.recipe.documents > 5


@pytest.mark.parametrize("alphabet", ["ab \n", "ab", "é ", "日本語", "🙂\n", "a"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_pieces_make_the_whole(tmp_path, alphabet, mark):
    text = "".join(alphabet[(i * i + i // 7) % len(alphabet)] for i in range(3000))
    path = tmp_path / "text.txt"
    path.write_bytes(mark + text.encode())
    in_order = list(files.pieces(path))
    assert "".join(in_order) == text
    drawn = list(files.drawn_pieces(path, torch.Generator().manual_seed(0)))
    assert len(drawn) == max(1, len(text.encode()) // 500)
    assert sorted("".join(drawn)) == sorted(text)
    assert all(piece in text for piece in drawn)
    if "\n" in alphabet:
        assert all(piece.endswith("\n") for piece in in_order[:-1])


def test_json_lines_are_read_as_far_as_needed(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(5000):
            file.write(json.dumps({"text": words(30) + f"w{i % 1000}"}) + "\n")
    read["bytes"] = 0
    made = load(path)
    assert read["bytes"] < 100_000 < path.stat().st_size / 5
    assert made.recipe.parts[0].reading == "first rows"
    assert torch.equal(made.ids, load(path, windows=None).ids[:4])


def test_no_line_is_parsed_that_is_not_drawn(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{i} " * 10}) + "\n\n" for i in range(1000)))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json_rows.json, "loads", lambda text: parsed.append(text) or loads(text))
    made = load(path, seed=3)
    assert len(parsed) < 300
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(3)).tolist()
    texts = "\n\n".join(f"w{i} " * 10 for i in order[: made.recipe.documents]).split()
    assert made.recipe.parts[0].text_tokens == len(texts)
    assert {int(i) for i in made.ids.flatten()} <= {int(text[1:]) for text in texts}


def test_a_list_of_rows_is_read_as_far_as_needed(tmp_path, read):
    rows = [{"text": words(30) + f'w{i % 1000} [],{{}}\\"'} for i in range(5000)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    read["bytes"] = 0
    made = load(path)
    assert read["bytes"] < 100_000 < path.stat().st_size / 5
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options in ({}, {"seed": 4}, {"windows": None}):
        assert torch.equal(load(path, **options).ids, load(lines, **options).ids)
    assert made.recipe.parts[0].reading == "first rows"


@pytest.mark.parametrize("piece", [4, 5, 6, 7, 11, 64])
def test_a_list_of_rows_may_be_cut_anywhere(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(files, "PIECE", piece)
    rows = [
        {"a": 'é"\\\n\ud83d', "b": [-1.5e-7, None, True, {}]},
        {},
        {"c": {"d": ["\u20ac", "🙂]}"]}, "e": 12345678901},
    ]
    for spaced in (
        json.dumps(rows),
        json.dumps(rows, indent=20),
        json.dumps(rows, ensure_ascii=False, separators=(",", ":")),
    ):
        text = spaced.encode("utf-8", "surrogatepass").replace(b"\xed\xa0\xbd", b"")
        path = tmp_path / "rows.json"
        path.write_bytes(b"\n " + text + b"\n\n")
        assert [row.values for row in json_rows.open_json(path)] == json.loads(text)


def test_a_parquet_file_is_read_as_far_as_needed(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": words(30) + f"w{i % 1000}", "big": "x" * 100} for i in range(4000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for options in ({}, {"seed": 4}):
        made, expected = load(f"{path}:text", **options), load(f"{lines}:text", **options)
        assert torch.equal(made.ids, expected.ids)
        assert made.recipe.documents == expected.recipe.documents
    groups = []
    original = pyarrow.parquet.ParquetFile.iter_batches

    def counted(self, *args, **kwargs):
        for batch in original(self, *args, **kwargs):
            groups.append(len(batch))
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    load(f"{path}:text")
    assert sum(groups) < 1500


def test_a_corpus_of_the_hub_is_read_as_far_as_needed(monkeypatch):
    rows = [{"text": words(30) + f"w{i % 1000}"} for i in range(3000)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    made = load("c4")
    assert (made.recipe.parts[0].reading, made.recipe.documents < 50) == ("first rows", True)
    papers, whole = load("wikitext2"), load("wikitext2", windows=None)
    assert torch.equal(papers.ids, whole.ids[:4])
    assert papers.recipe.parts[0].reading.startswith("first 4,")
    assert papers.recipe.documents < 50
    assert (load("wikitext2", seed=1).recipe.documents, whole.recipe.documents) == (3000, 3000)


@pytest.mark.slow
def test_a_gigabyte_costs_what_its_windows_cost(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.write(words(60_000).encode())
        file.seek((1 << 30) - 6)  # a hole, which takes no room on the disk
        file.write(b" w1 w2")
    monkeypatch.setattr(tokens, "SMALL", 4000)
    start = time.perf_counter()
    made = load_windows(str(path), word_tokenizer(), windows=1, length=10)
    assert time.perf_counter() - start < 2
    assert made.ids.tolist() == [[(i * 37 + i // 10) % 1000 for i in range(10)]]
