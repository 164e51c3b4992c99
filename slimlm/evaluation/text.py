"""Test text as token windows: fixed, evenly spaced, the same for every model that shares the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.calibration import start_token
from slimlm.checkpoint.manifest import WindowFigures
from slimlm.errors import UserError
from slimlm.evaluation.corrupt import CORRUPTIONS
from slimlm.evaluation.sources import PYTHON_REFERENCE, Text, load_text

DEFAULT_WINDOW = 2048


class TextFigures(WindowFigures):
    """Of a text among several: its name for short, too."""

    name: str


@dataclass(frozen=True)
class TestWindows:
    """tokens: [n, time], no overlap. source names the text; bos is the token each document starts with, or None.

    documents, lengths: [n, time], the number of each token's document and its bytes there. name: for short.
    """

    __test__ = False  # not a pytest class

    tokens: Tensor
    source: str
    bos: int | None
    documents: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))
    name: str = PYTHON_REFERENCE

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


def load_test_windows(
    text: Text | str | None,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None,
    length: int,
    corrupt: str | None = None,
    seed: int = 0,
) -> TestWindows:
    """`count` windows (None: all) of `length` tokens, evenly spaced over a text, which may be given by name or path;
    None is the Python reference.

    Each document is preceded by BOS (EOS where there is none); a text of papers is tokenised as these do. corrupt: one
    of CORRUPTIONS. Raises UserError when the text does not fill a window.
    """
    found = text if isinstance(text, Text) else load_text(text or PYTHON_REFERENCE, tokenizer)
    documents, source, name = found.documents, found.source, found.name
    if corrupt:
        documents = [CORRUPTIONS[corrupt](document, seed) for document in documents]
        source, name = f"{source} with {corrupt}", f"{name}+{corrupt}"
    bos = None if found.as_papers else start_token(tokenizer)
    pool = _tokens(documents, tokenizer, bos, found.as_papers)
    available = min(pool.shape[1] // length, found.most_windows or pool.shape[1])
    if available == 0:
        raise UserError(f"test text {source} holds {pool.shape[1]} tokens, fewer than one window of {length}")
    grid = pool[:, : available * length].view(3, available, length)
    if count is not None and count < available:
        grid = grid[:, torch.arange(count) * available // count]
    tokens, numbers, lengths = grid.contiguous()
    return TestWindows(tokens, source, bos, numbers, lengths, name)


def _tokens(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, bos: int | None, as_papers: bool) -> Tensor:
    """[3, tokens]: the tokens, the numbers of their documents, and each one's bytes."""
    return torch.cat([_of_one(one, index, tokenizer, bos, as_papers) for index, one in enumerate(documents)], 1)


def _of_one(document: str, index: int, tokenizer: PreTrainedTokenizerBase, bos: int | None, as_papers: bool) -> Tensor:
    found = tokenizer(document, add_special_tokens=as_papers, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    tokens = torch.tensor(found.input_ids, dtype=torch.int64)
    if tokenizer.is_fast:
        lengths = _lengths(document, [end for _, end in found.offset_mapping])
    else:  # which says nothing of them: as if all were equally long
        lengths = torch.linspace(0, len(document.encode("utf-8", "surrogatepass")), len(tokens) + 1).long().diff()
    first = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    rows = torch.cat([first, tokens]), torch.cat([torch.zeros_like(first), lengths])
    return torch.stack([rows[0], torch.full_like(rows[0], index), rows[1]])


def _lengths(document: str, ends: list[int]) -> Tensor:
    """Bytes from where one token ends to where the next one does, so that they add up to the document's: [tokens].

    ends: in characters; those of special tokens are 0.
    """
    places = torch.tensor([0, *ends], dtype=torch.int64).cummax(0).values
    if not document.isascii():
        encoded = torch.frombuffer(bytearray(document, "utf-8", "surrogatepass"), dtype=torch.uint8)
        starts = (encoded & 0xC0 != 0x80).nonzero().flatten()  # bytes of which letters are the first
        places = torch.cat([starts, torch.tensor([len(encoded)])])[places]
    return places.diff()
