"""Text becomes windows: a `--data` spec and a tokenizer give `[windows, length]` token ids with their recipe.

A spec is one source, or several with commas; `:N` at its end asks for N windows (`wikitext2:64,notes.txt:16`).

    wikitext2, ptb, c4            corpora of the hub, as the papers use them
    name:config:split:column      any corpus of the hub, or a folder; every field but the name may be empty
    notes.txt                     one text
    rows.jsonl[:column]           one text a row; .json (a list) and .parquet as well
    python-docs[:half]            the language reference inside Python; half is first, second or all
    self                          text that the model itself writes

The texts of a source are joined and tokenised once, then cut into windows that do not overlap; the tail is
dropped. Without a seed they come from the start; a seed draws them at random, each at most once.

Rows of c4, of unnamed hub corpora and of tables are texts apart, so no more of them are read than needed: up to
`AMPLE` characters for each token asked for. A seed then draws the rows as well. The recipe says so (`reading`).
"""

import contextlib
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from eckart.errors import DataError, NumericalError, OptionError

Tensor = torch.Tensor
Purpose = Literal["calibration", "evaluation"]
Kind = Literal["hub", "file", "python-docs", "self"]

KNOWN = ("wikitext2", "ptb", "c4", "python-docs", "self")
ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
HALVES = {"calibration": "first", "evaluation": "second"}
BOS = ("none", "start", "window")
AMPLE = 32  # characters read per token needed; a token of prose is 4 to 5 of them
BATCH = 16  # windows that a model writes side by side

_FILE = re.compile(r"(?P<name>.*\.(?:txt|jsonl|json|parquet))(?::(?P<column>[^:]*))?")
_BRACKETS = r"(?![^\[]*\])"  # not inside a slice such as train[:10%]


@dataclass(frozen=True)
class Part:
    """One source of a spec, as parsed; an empty field means the default. `windows` is its count, if it has one."""

    kind: Kind
    name: str
    config: str = ""
    split: str = ""
    column: str = ""
    windows: int | None = None


@dataclass(frozen=True)
class PartRecipe:
    """What one source gave: `documents` texts were read, which made `text_tokens` tokens."""

    source: str
    split: str
    reading: str  # whole, first rows, drawn rows, or written by the model
    documents: int
    text_tokens: int
    windows: int


@dataclass(frozen=True)
class DataRecipe:
    """Everything that makes the windows again. `tokens` is windows x length; the hash is `hash_tokens`."""

    spec: str
    windows: int
    length: int
    seed: int | None
    join: str
    bos: str
    split: str
    tokens_hash: str
    tokens: int
    documents: int
    parts: tuple[PartRecipe, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON takes and gives back unchanged."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}


@dataclass(frozen=True)
class Windows:
    """Token ids `[windows, length]`, int64, on the CPU."""

    ids: Tensor
    recipe: DataRecipe


@dataclass(frozen=True)
class _Source:
    documents: Sequence[str | None]
    split: str
    rows_apart: bool  # rows are texts of their own: a part of them will do, in any order


@dataclass(frozen=True)
class _Request:
    tokenizer: Any
    length: int
    generator: torch.Generator | None
    purpose: Purpose
    join: str
    bos: str


def load_windows(
    spec: str,
    tokenizer: Any,
    *,
    windows: int | None,
    length: int,
    seed: int | None = None,
    purpose: Purpose = "calibration",
    join: str = "\n\n",
    bos: str = "start",
    model: Any = None,
) -> Windows:
    """Windows of token ids from the sources of `spec` (see the module), `[windows, length]`.

    `windows` None takes every whole window; several sources share `windows` evenly, the first taking what is
    left over; counts in the spec win over `windows`. `purpose` chooses the default split: train or the first
    half to calibrate, test (c4: validation) or the second half to evaluate. `bos`: "start" puts the tokens that
    the tokenizer itself puts before a text once at the start of each source, "window" puts the BOS token at the
    start of each window, "none" adds nothing. The source `self` needs `model` and takes seed 0 for none.

    Raises `DataError` when a source is unknown, unreadable or too short, `OptionError` for an unknown `bos`.
    """
    if bos not in BOS:
        raise OptionError(f"bos is {bos!r}, but must be {', '.join(BOS)}.")
    shortest = 2 if bos == "window" else 1
    if length < shortest:
        raise DataError(f"length is {length}, but a window needs at least {shortest} token(s); give a larger --length.")
    parts = parse_spec(spec)
    counts = share_windows(parts, windows)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    request = _Request(tokenizer, length, generator, purpose, join, bos)
    made = [
        _written_windows(model, count, request) if part.kind == "self" else _cut_windows(part, count, request)
        for part, count in zip(parts, counts, strict=True)
    ]
    ids = torch.cat([part_ids for part_ids, _ in made])
    recipes = tuple(recipe for _, recipe in made)
    recipe = DataRecipe(
        spec=spec,
        windows=ids.shape[0],
        length=length,
        seed=seed,
        join=join,
        bos=bos,
        split=",".join(part.split for part in recipes),
        tokens_hash=hash_tokens(ids),
        tokens=ids.numel(),
        documents=sum(part.documents for part in recipes),
        parts=recipes,
    )
    return Windows(ids, recipe)


def parse_spec(spec: str) -> list[Part]:
    """The sources of a spec, in order. Raises `DataError` for an empty one, too many fields or a count of 0."""
    return [_parse_part(part.strip(), spec) for part in re.split("," + _BRACKETS, spec)]


def _parse_part(text: str, spec: str) -> Part:
    counted = re.fullmatch(r"(.*):(\d+)", text)
    source, windows = (counted[1], int(counted[2])) if counted else (text, None)
    if windows == 0:
        raise DataError(f"{text}: asks for 0 windows; a count must be positive.")
    if file := _FILE.fullmatch(source):
        if file["column"] and file["name"].endswith(".txt"):
            raise DataError(f"{source}: a .txt file has no columns; name it without {':' + file['column']!r}.")
        return Part("file", file["name"], column=file["column"] or "", windows=windows)
    name, *fields = re.split(":" + _BRACKETS, source)
    if not name:
        raise DataError(f"{spec!r}: a source has no name; write SOURCE or SOURCE:WINDOWS, with commas between.")
    if name == "python-docs" and (not fields or fields in (["first"], ["second"], ["all"])):
        return Part("python-docs", name, split=fields[0] if fields else "", windows=windows)
    if name == "self" and not fields:
        return Part("self", name, windows=windows)
    if name in ("python-docs", "self"):
        raise DataError(f"{source}: write python-docs:first, python-docs:second, python-docs:all, or just {name}.")
    if len(fields) > 3:
        raise DataError(f"{source}: has {len(fields) + 1} fields; a corpus of the hub is name:config:split:column.")
    config, split, column = (*fields, "", "", "")[:3]
    return Part("hub", name, config, split, column, windows)


def share_windows(parts: Sequence[Part], windows: int | None) -> list[int | None]:
    """How many windows each part gives; None is every whole one. Raises `DataError` when that cannot be said."""
    if windows is not None and windows < 1:
        raise DataError(f"windows is {windows}, but must be positive; leave it out for the whole text.")
    counts = [part.windows for part in parts]
    if len({count is None for count in counts}) == 2:
        bare = next(part.name for part in parts if part.windows is None)
        raise DataError(f"{bare}: has no count, but other sources have; give every source a count, or none.")
    if counts[0] is not None or windows is None:
        return counts
    each, rest = divmod(windows, len(parts))
    if each == 0:
        raise DataError(f"windows is {windows}, but {len(parts)} sources were named; ask for one each at least.")
    return [each + rest, *[each] * (len(parts) - 1)]


def hash_tokens(ids: Tensor) -> str:
    """SHA-256 in hex of the shape and the ids as little-endian int64."""
    return hashlib.sha256(str(tuple(ids.shape)).encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()


def check_length(windows: Windows, model: Any) -> None:
    """Raise `DataError` when the windows are longer than the positions that the model knows."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < windows.recipe.length:
        raise DataError(
            f"windows have {windows.recipe.length} tokens, but the model knows {limit} positions; "
            f"give --length {limit} or less."
        )


def _cut_windows(part: Part, count: int | None, request: _Request) -> tuple[Tensor, PartRecipe]:
    """The windows of a source, `[count, length]`, and what was read for them."""
    source = _read(part, request)
    per_window = request.length - (request.bos == "window")
    needed = None if count is None else count * per_window
    ids, documents, reading = _tokens(source, part.name, needed, request)
    whole = len(ids) // per_window
    if whole == 0:
        raise DataError(
            f"{part.name}: has {len(ids)} tokens, but one window needs {per_window}; "
            "give more text or a smaller --length."
        )
    if count is not None and whole < count:
        raise DataError(
            f"{part.name}: has {whole} windows of {request.length} tokens ({len(ids):,} tokens), but {count} were "
            "asked; give more text, fewer --windows or a smaller --length."
        )
    rows = ids[: whole * per_window].reshape(whole, per_window)
    if request.generator is not None:
        rows = rows[torch.randperm(whole, generator=request.generator)]
    rows = rows[:count]
    if request.bos == "window":
        rows = torch.cat([torch.full((len(rows), 1), _bos_id(request.tokenizer)), rows], dim=1)
    return rows.contiguous(), PartRecipe(_label(part), source.split, reading, documents, len(ids), len(rows))


def _tokens(source: _Source, name: str, needed: int | None, request: _Request) -> tuple[Tensor, int, str]:
    """Token ids `[tokens]` of the texts joined, how many texts they are, and which."""
    if needed is None or not source.rows_apart:
        texts = [text for text in source.documents if text is not None]
        return _tokenise(name, texts, request), len(texts), "whole"
    order: Sequence[int] = range(len(source.documents))
    if request.generator is not None:
        order = torch.randperm(len(order), generator=request.generator).tolist()
    texts = _take(source.documents, order, AMPLE * needed)
    ids = _tokenise(name, texts, request)
    if len(ids) < needed:  # rare: blank or repetitive text, with more than AMPLE characters a token
        texts = _take(source.documents, order, None)
        ids = _tokenise(name, texts, request)
    return ids, len(texts), "first rows" if request.generator is None else "drawn rows"


def _take(documents: Sequence[str | None], order: Sequence[int], enough: int | None) -> list[str]:
    """Texts in this order until they hold `enough` characters; rows without a text are passed over."""
    taken: list[str] = []
    characters = 0
    for index in order:
        if enough is not None and characters >= enough:
            break
        if (text := documents[index]) is not None:
            taken.append(text)
            characters += len(text)
    return taken


def _tokenise(name: str, texts: Sequence[str], request: _Request) -> Tensor:
    """Token ids `[tokens]`, led by what the tokenizer puts before a text when `bos` is "start"."""
    text = request.join.join(texts)
    if not text.strip():
        raise DataError(f"{name}: is empty; give a text.")
    lead = _lead(request.tokenizer, text[:1000]) if request.bos == "start" else []
    return torch.tensor(lead + _encode(request.tokenizer, text, special=False), dtype=torch.int64)


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose=False: a whole corpus is longer than the model's positions on purpose, so no warning about that
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _lead(tokenizer: Any, text: str) -> list[int]:
    """The special tokens that the tokenizer puts before a text; those it puts after it are left out."""
    bare, full = _encode(tokenizer, text, special=False), _encode(tokenizer, text, special=True)
    starts = range(len(full) - len(bare) + 1)
    return next((full[:start] for start in starts if full[start : start + len(bare)] == bare), [])


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise DataError("bos is 'window', but the tokenizer has no BOS token; use bos 'start' or 'none'.")
    return int(tokenizer.bos_token_id)


def _label(part: Part) -> str:
    fields = (part.name, part.config, part.split, part.column)
    return ":".join(fields).rstrip(":")


def _read(part: Part, request: _Request) -> _Source:
    if part.kind == "python-docs":
        half = part.split or HALVES[request.purpose]
        return _Source(_python_docs(half), half, rows_apart=False)
    if part.kind == "hub":
        return _read_hub(part, request.purpose)
    path = Path(part.name)
    try:
        if path.suffix == ".txt":
            return _Source([path.read_bytes().decode()], "all", rows_apart=False)
        return _Source(_read_table(path, part.column), "all", rows_apart=True)
    except FileNotFoundError:
        raise DataError(_no_such(part.name)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _no_such(name: str) -> str:
    """Names the nearest known source or file beside it, then all that is known."""
    folder = Path(name).parent
    beside = [str(file) for file in folder.iterdir() if file.suffix in ENDINGS] if folder.is_dir() else []
    close = difflib.get_close_matches(name, [*KNOWN, *beside], n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"{name}: no such file or corpus{hint} Known: {', '.join(KNOWN)}, a corpus of the hub as OWNER/NAME, "
        f"or a file that ends in {', '.join(ENDINGS)}."
    )


def _python_docs(half: str) -> list[str]:
    """The topics by name; the first half ends with the topic in which half of the characters are reached."""
    from pydoc_data.topics import topics  # a large module that most runs do not need

    texts = [text for _, text in sorted(topics.items())]
    total, seen, cut = sum(map(len, texts)), 0, 0
    while 2 * seen < total:
        seen += len(texts[cut])
        cut += 1
    return {"first": texts[:cut], "second": texts[cut:], "all": texts}[half]


def _read_table(path: Path, column: str) -> list[str | None]:
    """One column of a table, a text a row."""
    if path.suffix == ".parquet":
        return _read_parquet(path, column)
    text = path.read_bytes().decode()
    if path.suffix == ".json":
        listed = _parse_json(text, str(path))
        if not isinstance(listed, list):
            raise DataError(f"{path}: is not a list of rows; if it holds one row a line, call it .jsonl.")
        rows = [(f"{path} row {number}", row) for number, row in enumerate(listed, 1)]
    else:  # only "\n" ends a row: splitlines() would also split at separators that JSON allows inside strings
        lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
        rows = [(place, _parse_json(line, place)) for place, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: is empty; give a text.")
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f'{place}: is not an object such as {{"text": "..."}}.')
    strings = [key for key, value in rows[0][1].items() if isinstance(value, str)]
    column = _choose_column(str(path), column, list(rows[0][1]), strings)
    for place, row in rows:
        if not isinstance(row.get(column), str | None):
            raise DataError(f"{place}: {column!r} is {row[column]!r}, but must be a string.")
    return [row.get(column) for _, row in rows]


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: is not JSON: {error}.") from None


def _read_parquet(path: Path, column: str) -> list[str | None]:
    import pyarrow  # type: ignore[import-untyped]  # comes with datasets; slow to import
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        schema = pyarrow.parquet.read_schema(path)
        strings = [field.name for field in schema if str(field.type) in ("string", "large_string")]
        column = _choose_column(str(path), column, schema.names, strings)
        texts: list[str | None] = pyarrow.parquet.read_table(path, columns=[column])[column].to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as parquet: {_first_line(error)}.") from None
    return texts


def _choose_column(name: str, asked: str, columns: Sequence[str], strings: Sequence[str]) -> str:
    """The column asked for, else `text`, else the only one of strings."""
    if asked:
        if asked not in strings:
            raise DataError(f"{name}: has no column {asked!r} of strings; its columns are {', '.join(columns)}.")
        return asked
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise DataError(
            f"{name}: has no column 'text' and {len(strings)} columns of strings; "
            f"choose one by name, {name}:COLUMN. Its columns are {', '.join(columns)}."
        )
    return strings[0]


def _read_hub(part: Part, purpose: Purpose) -> _Source:
    """A corpus of the hub, or of a local folder in its layout."""
    if Path(part.name).is_file():
        raise DataError(f"{part.name}: the name of a file must end in {', '.join(ENDINGS)}.")
    if part.name not in KNOWN and difflib.get_close_matches(part.name, KNOWN, cutoff=0.7):
        raise DataError(_no_such(part.name))  # a slip of the pen; asking the hub would take half a minute
    split = part.split or {"calibration": "train", "evaluation": "test"}[purpose]
    path, config, column = part.name, part.config or None, part.column
    options: dict[str, Any] = {}
    if part.name == "wikitext2":
        path, config, column = "Salesforce/wikitext", config or "wikitext-2-raw-v1", column or "text"
    elif part.name == "ptb":
        path, column = "ptb-text-only/ptb_text_only", column or "sentence"
        options = {"revision": "refs/convert/parquet"}  # the original is a script, which datasets no longer runs
    elif part.name == "c4":
        split = "validation" if split == "test" else split
        shard = "c4-train.00000-of-01024" if split.startswith("train") else "c4-validation.00000-of-00008"
        path, column = "allenai/c4", column or "text"
        options = {"data_files": {split.partition("[")[0]: f"en/{shard}.json.gz"}}
    dataset = _load_dataset(part.name, path, config, split, options)
    strings = [name for name, kind in dataset.features.items() if getattr(kind, "dtype", "").endswith("string")]
    texts = dataset[_choose_column(_label(part), column, dataset.column_names, strings)]
    return _Source(texts, split, rows_apart=part.name not in ("wikitext2", "ptb"))


def _load_dataset(name: str, path: str, config: str | None, split: str, options: dict[str, Any]) -> Any:
    import datasets  # slow to import, and most runs read a file

    try:
        with _without_retry_messages():
            return datasets.load_dataset(path, config, split=split, **options)
    except ConnectionError:
        raise DataError(
            f"{name}: there is no access to the hub from here ({path}); "
            "use text at hand: a .txt file, python-docs, or self (text the model writes)."
        ) from None
    except FileNotFoundError as error:
        raise DataError(f"{_no_such(name)} The hub says: {_first_line(error)}") from None
    except Exception as error:  # the errors of datasets, pyarrow and the HTTP client share no base of their own
        raise DataError(f"{name}: cannot be loaded: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_retry_messages() -> Iterator[None]:
    """The hub's client warns at each retry; the error that follows says it once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _written_windows(model: Any, count: int | None, request: _Request) -> tuple[Tensor, PartRecipe]:
    """Windows that the model writes itself at temperature 1, in its own dtype and on its own device."""
    if model is None:
        raise DataError("self: needs the model that writes the text, and none was given; name a text instead.")
    if count is None:
        raise DataError("self: a model writes without end; say how many windows with --windows or self:N.")
    generator = request.generator or torch.Generator().manual_seed(0)
    was_training = model.training
    model.eval()
    try:
        batches = [_write(model, min(BATCH, count - start), request, generator) for start in range(0, count, BATCH)]
    finally:
        model.train(was_training)
    ids = torch.cat(batches)
    return ids, PartRecipe("self", "all", "written by the model", count, ids.numel(), count)


@torch.no_grad()
def _write(model: Any, rows: int, request: _Request, generator: torch.Generator) -> Tensor:
    """Ids `[rows, length]`: a row starts as a text does, or with any ordinary token; no special ones follow."""
    ordinary = _ordinary_ids(request.tokenizer, model.get_input_embeddings().weight.shape[0])
    if request.bos == "window":
        lead = [_bos_id(request.tokenizer)]
    else:
        lead = _lead(request.tokenizer, "a") if request.bos == "start" else []
    ids = torch.tensor(lead, dtype=torch.int64).repeat(rows, 1)
    if not lead:
        ids = ordinary[torch.randint(len(ordinary), (rows, 1), generator=generator)]
    cache, fed = None, ids
    while ids.shape[1] < request.length:
        out = model(input_ids=fed.to(model.device), past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].float().cpu()[:, ordinary]
        if not logits.isfinite().all():
            raise NumericalError("self: the model's logits hold NaN or infinity; calibrate on a text instead.")
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, ordinary[drawn]], dim=1)
        cache = getattr(out, "past_key_values", None)
        fed = ids if cache is None else ids[:, -1:]  # a model without such a cache reads from the start again
    return ids[:, : request.length]


def _ordinary_ids(tokenizer: Any, rows: int) -> Tensor:
    """Ids `[ordinary]` below `rows` (the embedding's) that are tokens of text, not special ones."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return torch.tensor([index for index in range(min(rows, len(tokenizer))) if index not in special])
