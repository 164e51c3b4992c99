"""Where calibration text comes from: files, folders, saved datasets, the hub. Each gives documents: texts or tokens."""

import glob
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from slimlm.calibration.files import READERS, UNPACKED, Row, is_readable, read_file, split_documents
from slimlm.calibration.rows import Document, needed_columns
from slimlm.errors import UserError, nearest, one_line
from slimlm.plain import Json
from slimlm.recipe import SELF, Meant
from slimlm.started import world_size

__all__ = ["Document", "documents_of", "split_documents"]

HUB_SHORT_NAMES: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},  # one row a line
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    "alpaca": {"path": "tatsu-lab/alpaca", "split": "train"},
    "fineweb-edu": {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train"},
}
JOINED = ("wikitext2",)  # the rows, in order and with blank lines between them, are one document, as everyone has it
SAVED = ("dataset_info.json", "dataset_dict.json")  # in a directory that `save_to_disk` made
STANDARD_INPUT = "-"
DEFAULT = Meant()
Made = Callable[[Row], Document]


def documents_of(dataset: str, path: Path, seed: int, made: Made, meant: Meant = DEFAULT) -> Iterator[Document]:
    """Documents of a source, those of local files and of standard input shuffled by the seed. made: what makes one of a
    row. Raises UserError for a source that cannot be read."""
    documents = local_documents(dataset, path, made, meant.column)
    if documents is not None:
        random.Random(seed).shuffle(documents)
        return iter(documents)
    if not is_of_hub(dataset, path):
        return _dataset_rows(dataset, _load_saved(dataset, path), made, meant.split)
    rows = _dataset_rows(dataset, _load_hub(dataset, seed, meant), made)
    return iter(["\n\n".join(str(row) for row in rows)]) if dataset in JOINED else rows


def local_documents(dataset: str, path: Path, made: Made, column: str | None = None) -> list[Document] | None:
    """Documents of local files or of standard input, in their order; None where it is neither. Raises UserError for
    what cannot be read."""
    files = local_files(dataset, path)
    if not files and dataset != STANDARD_INPUT:
        return None
    rows = chain.from_iterable(_file_rows(file, column) for file in files) if files else _piped_rows()
    documents = [document for document in map(made, rows) if document]
    if not documents:
        raise UserError(f"calibration file {path} is empty" if files else "standard input is empty")
    return documents


def is_of_hub(dataset: str, path: Path) -> bool:
    """Whether a name is to be looked for on the hub: it is no path, nor looks like one."""
    looks_local = dataset.startswith(("/", "./", "../", "~", STANDARD_INPUT)) or glob.has_magic(dataset)
    return not (path.exists() or looks_local or {*path.suffixes} & {*READERS, *UNPACKED, ".npy"})


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


def _file_rows(path: Path, column: str | None) -> Iterator[Row]:
    return read_file(path, lambda names: needed_columns(names, column, str(path)))


@cache
def _piped() -> bytes:
    """All of standard input, once. Raises UserError where there is nobody to pipe it, or several to read it."""
    if world_size() > 1:
        raise UserError("several processes cannot all read standard input: give them a file")
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("standard input is a terminal, and nothing is piped in: `cat notes.txt | slimlm ...`")
    return sys.stdin.buffer.read()


def _piped_rows() -> Iterator[Row]:
    """JSON where it begins like it, a row a line or a list of them; else text."""
    is_json = _piped().lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
    try:
        yield from READERS[".json" if is_json else ".txt"](_piped(), lambda names: names)
    except ValueError as error:
        raise UserError(f"standard input cannot be read as {'JSON' if is_json else 'text'}: {error}") from error


def _load_saved(dataset: str, path: Path) -> Any:
    from datasets import load_from_disk

    if not path.exists():
        several = " (several sources need their shares: a.txt:0.7,b.txt:0.3)" if "," in dataset else ""
        raise UserError(f"calibration data {path} does not exist{several}")
    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"calibration directory {path} is not a saved dataset: {one_line(error)}") from error


def _load_hub(dataset: str, seed: int, meant: Meant) -> Any:
    from datasets import load_dataset

    if "/" not in dataset and dataset not in HUB_SHORT_NAMES:
        known = [SELF, *HUB_SHORT_NAMES]
        raise UserError(
            f"calibration data {dataset!r} is neither a file nor one of {', '.join(known)} nor a hub id (owner/name)"
            f"{nearest(dataset, known)}"
        )
    where = HUB_SHORT_NAMES.get(dataset, {"path": dataset, "split": "train"})
    asked = {"name": meant.config, "split": meant.split, "revision": meant.revision}
    where = where | {name: value for name, value in asked.items() if value is not None}
    try:
        rows = load_dataset(**where, streaming=True)
        return rows if dataset in JOINED else rows.shuffle(seed=seed, buffer_size=10_000)
    except Exception as error:  # datasets and the hub client raise their HTTP library's own errors too
        raise _unreachable(dataset, error) from error


def _dataset_rows(
    dataset: str, rows: Iterable[Json] | Mapping[str, Iterable[Json]], made: Made, split: str | None = None
) -> Iterator[Document]:
    """Rows of a datasets.Dataset, or of the one, the train or the named split of a DatasetDict."""
    if isinstance(rows, Mapping):
        if split is not None and split not in rows:
            raise UserError(
                f"calibration data {dataset} has no split {split!r}{nearest(split, rows)} (it has: {', '.join(rows)})"
            )
        rows = rows[split or "train"] if split or "train" in rows else next(iter(rows.values()))
    elif split is not None:
        raise UserError(f"calibration data {dataset} has no splits: leave out --dataset-split")
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
