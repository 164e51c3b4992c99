"""Test text as token windows: fixed, evenly spaced, the same for every model that shares the tokenizer."""

import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.calibration import split_documents, start_token
from slimlm.checkpoint.manifest import WindowFigures
from slimlm.errors import UserError

PYTHON_REFERENCE = "python-reference"
DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class TestWindows:
    """tokens: [n, time], no overlap. source names the text; bos is the token each document starts with, or None."""

    __test__ = False  # not a pytest class

    tokens: Tensor
    source: str
    bos: int | None

    def describe(self) -> WindowFigures:
        """What a manifest says of them."""
        count, length = self.tokens.shape
        return {
            "text": self.source,
            "windows": count,
            "window": length,
            "stride": length,
            "bos": self.bos,
            "predicted_tokens": count * (length - 1),
        }


def python_reference() -> list[str]:
    """The topics of the Python language reference that ships in the standard library, in alphabetical order."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def load_test_windows(
    text: str | None, tokenizer: PreTrainedTokenizerBase, count: int | None, length: int
) -> TestWindows:
    """`count` windows (None: all) of `length` tokens, evenly spaced over a .txt file or the Python reference.

    Each document is preceded by BOS (EOS where there is none). Raises UserError when the text does not fill a window.
    """
    if text is None:
        documents = python_reference()
        source = f"{PYTHON_REFERENCE} (pydoc topics of Python {sys.version.split()[0]})"
    else:
        documents, source = _read_documents(Path(text).expanduser()), text
    bos = start_token(tokenizer)
    pool: list[int] = []
    for document in documents:
        pool.extend([] if bos is None else [bos])
        pool.extend(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
    available = len(pool) // length
    if available == 0:
        raise UserError(f"test text {source} holds {len(pool)} tokens, fewer than one window of {length}")
    grid = torch.tensor(pool[: available * length]).view(available, length)
    if count is not None and count < available:
        grid = grid[torch.arange(count) * available // count]
    return TestWindows(grid, source, bos)


def _read_documents(path: Path) -> list[str]:
    try:
        return split_documents(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"test text {path} cannot be read: {reason}") from error
