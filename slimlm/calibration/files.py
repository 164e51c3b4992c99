"""Local files as rows: text, JSON, CSV, Parquet, Arrow, plain or compressed. What is wrong is said with its place.

Read by the standard library and PyArrow rather than by `datasets`, whose readers guess types block by block, copy all
of it into a cache, and do not say which line is broken.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from slimlm.errors import UserError, one_line
from slimlm.plain import Json

DOCUMENT_SEPARATOR = "<|endoftext|>"
Row = str | Mapping[str, Json]  # a text, or named columns
Wanted = Callable[[Collection[str]], Collection[str]]  # of a table's columns those that are to be read


def read_file(path: Path, wanted: Wanted = lambda names: names) -> Iterator[Row]:
    """The rows of a file of any kind in READERS. Raises UserError with the place of what is wrong."""
    kind, packing = kind_of(path)
    if kind is None:
        names = ", ".join(sorted([*READERS, ".npy"]))
        raise UserError(f"calibration file {path} is none of {names}, plain or {', '.join(UNPACKED)}")
    try:
        data = UNPACKED[packing](path) if packing else path.read_bytes()
        yield from READERS[kind](data, wanted)
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"calibration file {path} cannot be read: {one_line(error)}") from error


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """The key of its reader, and of what unpacks it first."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in UNPACKED:
        return (before, last) if before in READERS else (None, last)
    return (last, None) if last in READERS else (None, None)


def is_readable(path: Path) -> bool:
    """Whether there is a reader for it."""
    return kind_of(path)[0] is not None


def split_documents(text: str) -> list[str]:
    """Documents of a plain text, separated by lines that hold only `<|endoftext|>`; one where there are none."""
    documents = ("\n" + text + "\n").split(f"\n{DOCUMENT_SEPARATOR}\n")
    return [document.strip("\n") for document in documents if document.strip()]


def decoded(data: bytes) -> str:
    """UTF-8, whatever begins it and ends its lines. Raises ValueError that names the first other byte."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"it is not UTF-8 text: byte {error.start}, in line {line}") from error


def _text(data: bytes, wanted: Wanted) -> Iterator[Row]:
    yield from split_documents(decoded(data))


def _json_lines(data: bytes, wanted: Wanted) -> Iterator[Row]:
    for number, line in enumerate(decoded(data).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            yield _row(row, f"line {number}")


def _json(data: bytes, wanted: Wanted) -> Iterator[Row]:
    """A list of rows, an object that holds one, or, as many call it too, a row a line."""
    text = decoded(data)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"it is not JSON: {error}") from error
        yield from _json_lines(data, wanted)
        return
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        found = lists[0] if len(lists) == 1 else [found]
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        yield _row(row, f"row {number}")


def _row(row: Json, place: str) -> Row:
    if isinstance(row, (str, Mapping)):
        return row
    raise ValueError(f"{place} is {type(row).__name__}, not an object with columns, nor a text")


def _table(separator: str) -> Callable[[bytes, Wanted], Iterator[Row]]:
    def read(data: bytes, wanted: Wanted) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader(io.StringIO(decoded(data), newline=""), delimiter=separator, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} has another number of cells than the first line")
                yield row
        except csv.Error as error:
            raise ValueError(f"behind line {reader.line_num}: {error}") from error

    return read


def _parquet(data: bytes, wanted: Wanted) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
    for batch in file.iter_batches(columns=list(wanted(file.schema_arrow.names))):
        yield from batch.to_pylist()


def _arrow(data: bytes, wanted: Wanted) -> Iterator[Row]:
    import pyarrow

    source = pyarrow.BufferReader(data)
    try:
        table = pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_file(pyarrow.BufferReader(data)).read_all()
    yield from table.select(list(wanted(table.column_names))).to_pylist()


def _zstd(path: Path) -> bytes:
    import pyarrow

    with pyarrow.input_stream(str(path), compression="zstd") as stream:
        found: bytes = stream.read()
        return found


READERS: dict[str, Callable[[bytes, Wanted], Iterator[Row]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
UNPACKED: dict[str, Callable[[Path], bytes]] = {
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".bz2": lambda path: bz2.decompress(path.read_bytes()),
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".zst": _zstd,
}
