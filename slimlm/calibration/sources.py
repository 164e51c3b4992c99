"""Where calibration text comes from: files, saved datasets, the hub. Each gives documents: texts or lists of tokens."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimlm.errors import UserError, nearest, one_line
from slimlm.plain import Json
from slimlm.recipe import SELF

Document = str | list[int]  # text, or tokens
DOCUMENT_SEPARATOR = "<|endoftext|>"
HUB_SHORT_NAMES: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},  # one row a line
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    "alpaca": {"path": "tatsu-lab/alpaca", "split": "train"},
    "fineweb-edu": {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train"},
}
JOINED = ("wikitext2",)  # the rows, in order and with blank lines between them, are one document, as everyone has it


def documents_of(dataset: str, path: Path, text_column: str, seed: int) -> Iterator[Document]:
    """Documents of a source, a local file's shuffled by the seed. Raises UserError for one that cannot be read."""
    if path.is_file():
        documents = [document for document in _local_documents(path, text_column) if document]
        if not documents:
            raise UserError(f"calibration file {path} is empty")
        random.Random(seed).shuffle(documents)
        return iter(documents)
    if path.is_dir() or dataset.startswith(("/", "./", "../", "~")) or path.suffix in _FILE_READERS:
        return _dataset_rows(dataset, _load_saved(path), text_column)
    rows = _dataset_rows(dataset, _load_hub(dataset, seed), text_column)
    return iter(["\n\n".join(str(row) for row in rows)]) if dataset in JOINED else rows


def _local_documents(path: Path, text_column: str) -> list[Document]:
    reader = _FILE_READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"calibration file {path} is none of {', '.join(sorted([*_FILE_READERS, '.npy']))}")
    try:
        return reader(path, text_column)
    except (OSError, ValueError) as error:
        raise UserError(f"calibration file {path} cannot be read: {one_line(error)}") from error


def _read_text(path: Path, text_column: str) -> list[Document]:
    return [*split_documents(path.read_text(encoding="utf-8"))]


def split_documents(text: str) -> list[str]:
    """Documents of a plain text, separated by lines that hold only `<|endoftext|>`; one where there are none."""
    documents = ("\n" + text + "\n").split(f"\n{DOCUMENT_SEPARATOR}\n")
    return [document.strip("\n") for document in documents if document.strip()]


def _read_jsonl(path: Path, text_column: str) -> list[Document]:
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file if line.strip())
        return [_row_content(row, text_column, str(path)) for row in rows]


def _read_parquet(path: Path, text_column: str) -> list[Document]:
    import pyarrow.parquet

    columns = pyarrow.parquet.read_schema(path).names
    column = text_column if text_column in columns else "input_ids"
    if column not in columns:
        raise _no_column(text_column, columns, str(path))
    table = pyarrow.parquet.read_table(path, columns=[column])
    return [_checked(content, column, str(path)) for content in table.column(column).to_pylist()]


_FILE_READERS: dict[str, Callable[[Path, str], list[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _row_content(row: Json, text_column: str, source: str) -> Document:
    if not isinstance(row, dict) or (text_column not in row and "input_ids" not in row):
        raise _no_column(text_column, row if isinstance(row, dict) else [], source)
    column = text_column if text_column in row else "input_ids"
    return _checked(row[column], column, source)


def _checked(content: Json, column: str, source: str) -> Document:
    """A text or a list of tokens; a missing value is an empty text."""
    if content is None:
        return ""
    if isinstance(content, str) or (isinstance(content, list) and all(type(token) is int for token in content)):
        return content
    raise UserError(f"calibration data {source}: column {column!r} holds {content!r:.40}, not text or tokens")


def _no_column(text_column: str, columns: Iterable[str], source: str) -> UserError:
    return UserError(
        f"calibration data {source} has no column {text_column!r}{nearest(text_column, columns)} "
        f"(it has: {', '.join(columns) or 'none'}): pass --text-column"
    )


def _load_saved(path: Path) -> Any:
    from datasets import load_from_disk

    if not path.exists():
        raise UserError(f"calibration data {path} does not exist")
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"calibration directory {path} is not a saved dataset: {one_line(error)}") from error


def _load_hub(dataset: str, seed: int) -> Any:
    from datasets import load_dataset

    if "/" not in dataset and dataset not in HUB_SHORT_NAMES:
        known = [SELF, *HUB_SHORT_NAMES]
        raise UserError(
            f"calibration data {dataset!r} is neither a file nor one of {', '.join(known)} nor a hub id (owner/name)"
            f"{nearest(dataset, known)}"
        )
    where = HUB_SHORT_NAMES.get(dataset, {"path": dataset, "split": "train"})
    try:
        rows = load_dataset(**where, streaming=True)
        return rows if dataset in JOINED else rows.shuffle(seed=seed, buffer_size=10_000)
    except Exception as error:  # datasets and the hub client raise their HTTP library's own errors too
        raise _unreachable(dataset, error) from error


def _dataset_rows(
    dataset: str, rows: Iterable[Json] | Mapping[str, Iterable[Json]], text_column: str
) -> Iterator[Document]:
    """Rows of a datasets.Dataset, or of the one or train split of a DatasetDict."""
    if isinstance(rows, Mapping):
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    try:
        for row in rows:
            yield _row_content(row, text_column, dataset)
    except UserError:
        raise
    except Exception as error:  # a connection lost while streaming
        raise _unreachable(dataset, error) from error


def _unreachable(dataset: str, error: Exception) -> UserError:
    return UserError(
        f"calibration dataset {dataset!r} could not be fetched ({one_line(error)}): give a local file, "
        "or use --dataset self, which needs no data"
    )
