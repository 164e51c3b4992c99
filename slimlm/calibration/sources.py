"""Where calibration text comes from: files, folders, saved datasets, the hub. Each gives documents: texts or tokens."""

import glob
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slimlm.calibration.files import READERS, UNPACKED, Row, is_readable, read_file, split_documents
from slimlm.calibration.rows import Document, needed_columns
from slimlm.errors import UserError, nearest, one_line
from slimlm.plain import Json
from slimlm.recipe import SELF

__all__ = ["Document", "documents_of", "split_documents"]

HUB_SHORT_NAMES: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},  # one row a line
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    "alpaca": {"path": "tatsu-lab/alpaca", "split": "train"},
    "fineweb-edu": {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train"},
}
JOINED = ("wikitext2",)  # the rows, in order and with blank lines between them, are one document, as everyone has it
SAVED = ("dataset_info.json", "dataset_dict.json")  # in a directory that `save_to_disk` made
Made = Callable[[Row], Document]


def documents_of(dataset: str, path: Path, column: str | None, seed: int, made: Made) -> Iterator[Document]:
    """Documents of a source, those of local files shuffled by the seed. made: what makes one of a row. Raises UserError
    for a source that cannot be read."""
    files = local_files(dataset, path)
    if files:
        documents = [document for file in files for document in file_documents(file, column, made) if document]
        if not documents:
            raise UserError(f"calibration file {path} is empty")
        random.Random(seed).shuffle(documents)
        return iter(documents)
    if path.is_dir() or dataset.startswith(("/", "./", "../", "~")) or {*path.suffixes} & {*READERS, *UNPACKED}:
        return _dataset_rows(dataset, _load_saved(path), made)
    rows = _dataset_rows(dataset, _load_hub(dataset, seed), made)
    return iter(["\n\n".join(str(row) for row in rows)]) if dataset in JOINED else rows


def local_files(dataset: str, path: Path) -> list[Path]:
    """A file; the readable ones of a folder that is no saved dataset, in order of their names; what a pattern matches.
    Raises UserError for folders and patterns without any."""
    if path.is_file():
        return [path]
    if path.is_dir() and not any((path / name).is_file() for name in SAVED):
        found = sorted(file for file in path.iterdir() if file.is_file() and is_readable(file))
        if not found:
            raise UserError(f"calibration directory {path} holds no saved dataset and no {', '.join(sorted(READERS))}")
        return found
    if glob.has_magic(dataset) and not path.exists():
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
        if not found:
            raise UserError(f"calibration data {dataset!r} matches no file")
        return found
    return []


def file_documents(path: Path, column: str | None, made: Made) -> list[Document]:
    """Of a local file. Raises UserError for one that cannot be read, and rows that are no documents."""
    return [made(row) for row in read_file(path, lambda names: needed_columns(names, column, str(path)))]


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


def _dataset_rows(dataset: str, rows: Iterable[Json] | Mapping[str, Iterable[Json]], made: Made) -> Iterator[Document]:
    """Rows of a datasets.Dataset, or of the one or train split of a DatasetDict."""
    if isinstance(rows, Mapping):
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    try:
        for row in rows:
            if not isinstance(row, Mapping):
                raise UserError(f"calibration data {dataset} holds {row!r:.40}, not rows")
            yield made(row)
    except UserError:
        raise
    except Exception as error:  # a connection lost while streaming
        raise _unreachable(dataset, error) from error


def _unreachable(dataset: str, error: Exception) -> UserError:
    return UserError(
        f"calibration dataset {dataset!r} could not be fetched ({one_line(error)}): give a local file, "
        "or use --dataset self, which needs no data"
    )
