"""Corpora of the hub, and of local folders in its layout."""

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Self

from eckart.errors import DataError
from eckart.text.files import check_regular
from eckart.text.foreign import first_line
from eckart.text.parquet import BATCH, rows_of
from eckart.text.rows import Row, Rows
from eckart.text.specs import ENDINGS, KNOWN, Purpose, SourceSpec, no_such

PAPERS = ("wikitext2", "ptb")  # whose rows are lines of one text


class HubRows(Rows):
    """The rows of a corpus that `datasets` holds on disk; media in it are not decoded."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset.with_format("arrow")

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BATCH):
            yield from rows_of(self.name, self.dataset[start : start + BATCH], start + 1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return next(rows_of(self.name, self.dataset[[index]], index + 1))

    def only(self, columns: Sequence[str]) -> Self:
        there = [column for column in columns if column in self.dataset.column_names]
        return type(self)(self.name, self.dataset.select_columns(there))


def open_hub(spec: SourceSpec, purpose: Purpose) -> tuple[HubRows, str, str]:
    """The rows of a corpus, its split, and the column that the papers take; empty for a corpus of no paper."""
    _check_name(spec)
    split = spec.split or {"calibration": "train", "evaluation": "test"}[purpose]
    path, config, column = spec.name, spec.config or None, ""
    options: dict[str, Any] = {}
    if spec.name == "wikitext2":
        path, config, column = "Salesforce/wikitext", config or "wikitext-2-raw-v1", "text"
    elif spec.name == "ptb":
        path, column = "ptb-text-only/ptb_text_only", "sentence"
        options = {"revision": "refs/convert/parquet"}  # the original is a script, which datasets no longer runs
    elif spec.name == "c4":
        split = "validation" if split == "test" else split
        shard = "c4-train.00000-of-01024" if split.startswith("train") else "c4-validation.00000-of-00008"
        path, column = "allenai/c4", "text"
        options = {"data_files": {split.partition("[")[0]: f"en/{shard}.json.gz"}}
    elif os.path.isdir(spec.path):  # False for a name that no folder can have
        path = str(spec.path)
    return HubRows(spec.name, _load_dataset(spec, path, config, split, options)), split, column


def _check_name(spec: SourceSpec) -> None:
    """Refuse what is plainly no corpus; asking the hub would take half a minute."""
    with contextlib.suppress(OSError):
        if spec.name not in KNOWN and spec.path.exists() and not spec.path.is_dir():
            check_regular(spec.path)
            packed = "; unpack it first" if spec.path.suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
            raise DataError(f"{spec.name}: the name of a file must end in {', '.join(ENDINGS)}{packed}.")
    if spec.name not in KNOWN and difflib.get_close_matches(spec.name, KNOWN, cutoff=0.7):
        raise DataError(no_such(spec))


def _load_dataset(spec: SourceSpec, path: str, config: str | None, split: str, options: dict[str, Any]) -> Any:
    import datasets  # slow to import, and most runs read a file

    try:
        with _without_retry_messages():
            return datasets.load_dataset(path, config, split=split, **options)
    except ConnectionError:
        raise DataError(
            f"{spec.name}: there is no access to the hub from here ({path}); "
            "use text at hand: a .txt file, python-docs, or self (text the model writes)."
        ) from None
    except FileNotFoundError as error:
        raise DataError(f"{no_such(spec)} The hub says: {first_line(error)}") from None
    except Exception as error:  # the errors of datasets, pyarrow and the HTTP client share no base of their own
        raise DataError(f"{spec.name}: cannot be loaded: {first_line(error)}") from error


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
