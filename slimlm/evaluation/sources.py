"""Texts to measure on, by name or path: documents, and how they become windows."""

import ast
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from slimlm.calibration import local_documents, split_documents
from slimlm.calibration.files import Row, decoded, is_readable
from slimlm.calibration.rows import Document, document_of
from slimlm.errors import UserError, nearest, one_line
from slimlm.plain import Json

PYTHON_REFERENCE, PYTHON_SOURCES = "python-reference", "python-sources"
PAPERS_WINDOW = 2048
MODULES = (
    "argparse", "ast", "bisect", "calendar", "configparser", "csv", "dataclasses", "decimal", "difflib", "fractions",
    "functools", "gzip", "heapq", "inspect", "ipaddress", "locale", "mailbox", "optparse", "pathlib", "pickle",
    "queue", "random", "sched", "shelve", "smtplib", "statistics", "subprocess", "tarfile", "textwrap", "threading",
    "tokenize", "typing", "uuid", "weakref", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """Documents to be predicted. name: what was asked for. source: what that is, in full.

    as_papers: one document, tokenised with whatever the tokenizer puts around a text, all windows of PAPERS_WINDOW
    tokens unless others are asked for, or the first `most_windows`: what pruning papers' scripts do.
    """

    name: str
    source: str
    documents: list[str]
    as_papers: bool = False
    most_windows: int | None = None


def python_reference() -> list[str]:
    """The topics of the Python language reference that ships in the standard library, in alphabetical order."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def python_sources() -> list[str]:
    """Modules of the standard library, as far as they are there: code, with comments and docstrings."""
    files = (Path(ast.__file__).with_name(f"{name}.py") for name in MODULES)
    return [file.read_text(encoding="utf-8") for file in files if file.is_file()]


def default_texts() -> tuple[str, ...]:
    """Documentation and code, whichever of it the calibration text was not; both without a network."""
    return (PYTHON_REFERENCE, *([PYTHON_SOURCES] if python_sources() else []))


def load_text(name: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    """A text by name, or what local files of calibration data may be, rows through the tokenizer's template where they
    are chats. Raises UserError for what cannot be read or fetched, or is empty."""
    path = Path(name).expanduser()
    if name in TEXTS and not path.is_file():
        return TEXTS[name]()

    def made(row: Row) -> Document:
        return document_of(row, None, tokenizer, name)

    try:
        if path.is_file() and not is_readable(path):  # of any other name it is text
            found: list[Document] | None = [*split_documents(decoded(path.read_bytes()))]
        else:
            found = local_documents(name, path, made)
    except (UserError, OSError, ValueError) as error:
        said = str(error).removeprefix("calibration ") if isinstance(error, UserError) else f"text {path}: {error}"
        raise UserError(f"test {said}") from error
    if found is None and (path.suffix or "/" in name):
        raise UserError(f"test text {path} cannot be read: there is no such file")
    if found is None:
        raise UserError(f"text {name!r} is neither a file nor one of {', '.join(TEXTS)}{nearest(name, TEXTS)}")
    documents = [document for document in found or () if isinstance(document, str)]
    if not found:
        raise UserError(f"test text {path} is empty")
    if len(documents) < len(found):
        raise UserError(f"test file {path} holds tokens, and what is measured are texts")
    return Text(name, name, documents)


def _of_python(name: str, what: str, documents: Callable[[], list[str]]) -> Text:
    found = documents()
    if not found:
        raise UserError(f"text {name!r}: this Python comes without it; give a text file")
    return Text(name, f"{name} ({what} of Python {sys.version.split()[0]})", found)


def _wikitext2() -> Text:
    """The test split, rows joined by blank lines (GPTQ's and SparseGPT's scripts)."""
    rows = _fetched("wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"})
    return Text("wikitext2", "wikitext2 (raw, test split, joined)", ["\n\n".join(rows)], as_papers=True)


def _c4() -> Text:
    """The first 1,100 documents of the first validation shard, joined by spaces, 256 windows (SparseGPT's script)."""
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    rows = islice(
        _fetched("c4", {"path": "allenai/c4", "data_files": files, "split": "validation", "streaming": True}), 1100
    )
    return Text("c4", "c4 (first 1,100 documents of a validation shard, joined)", [" ".join(rows)], True, 256)


def _fetched(name: str, where: Mapping[str, Json]) -> Iterator[str]:
    from datasets import load_dataset

    try:
        yield from (row["text"] for row in load_dataset(**where))
    except Exception as error:  # datasets and the hub client raise their HTTP library's own errors too
        raise UserError(
            f"text {name!r} could not be fetched ({one_line(error)}): give a text file, or one of "
            f"{PYTHON_REFERENCE}, {PYTHON_SOURCES}, which need no network"
        ) from error


TEXTS: dict[str, Callable[[], Text]] = {
    PYTHON_REFERENCE: lambda: _of_python(PYTHON_REFERENCE, "pydoc topics", python_reference),
    PYTHON_SOURCES: lambda: _of_python(PYTHON_SOURCES, "standard library", python_sources),
    "wikitext2": _wikitext2,
    "c4": _c4,
}
