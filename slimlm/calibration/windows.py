"""Calibration data: any text source -> token windows [n, time], the same for the same seed, with a hash.

Documents are shuffled by the seed, tokenised without the tokenizer's own special tokens, each preceded by one BOS
(EOS where the tokenizer has no BOS, nothing where it has neither), joined, and cut into windows of equal length, of
which the seed picks n. There is no padding.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.calibration.files import Row
from slimlm.calibration.rows import Document, document_of
from slimlm.calibration.sources import DEFAULT, documents_of
from slimlm.checkpoint.manifest import Part
from slimlm.errors import UserError, one_line
from slimlm.recipe import Meant

logger = logging.getLogger(__name__)

POOL_FACTOR = 16  # windows are picked from this many times as many, where the source has them


@dataclass(frozen=True)
class Windows:
    """tokens: [n, time]. source: where they came from. bos: the token each document starts with, or None. origins: the
    source of each, where there are several. documents: of every source, how many were read to cut them from."""

    tokens: Tensor
    source: str
    bos: int | None
    origins: tuple[str, ...] = ()
    documents: Mapping[str, int] = field(default_factory=dict)

    @property
    def of_each(self) -> tuple[str, ...]:
        """The source of each window."""
        return self.origins or (self.source,) * len(self.tokens)

    @property
    def sha256(self) -> str:
        """Hash of shape and tokens."""
        return _hash(self.tokens)

    def of(self, source: str) -> Tensor:
        """The windows of one source, in order: [n, time]."""
        return self.tokens[torch.tensor([one == source for one in self.of_each])]

    @property
    def parts(self) -> list[Part]:
        """What there is of each source."""
        found = {source: self.of(source) for source in dict.fromkeys(self.of_each)}
        return [
            {
                "source": source,
                "documents": self.documents.get(source, len(tokens)),  # of its own a model writes one a window
                "windows": len(tokens),
                "tokens": tokens.numel(),
                "sha256": _hash(tokens),
            }
            for source, tokens in found.items()
        ]

    def batches(self, size: int) -> list[Tensor]:
        """So many windows at a time: [batch, time] each."""
        return list(self.tokens.split(size))


def _hash(tokens: Tensor) -> str:
    """tokens: [n, time]"""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def interleaved(parts: Sequence[Windows]) -> Windows:
    """Windows of one length from several sources, each spread evenly over all: whichever are taken to learn from, to
    hold out or to begin with, they are of all kinds."""
    if len(parts) == 1:
        return parts[0]
    places = [(torch.arange(len(part.tokens)) + 0.5) / len(part.tokens) for part in parts]
    order = torch.cat(places).argsort(stable=True)
    tokens = torch.cat([part.tokens for part in parts])[order]
    origins = [name for part in parts for name in part.of_each]
    source = ", ".join(part.source for part in parts)
    documents = {name: count for part in parts for name, count in part.documents.items()}
    return Windows(tokens, source, parts[0].bos, tuple(origins[index] for index in order), documents)


def load_windows(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    length: int,
    seed: int = 0,
    meant: Meant = DEFAULT,
) -> Windows:
    """Windows from a file (text, JSON, CSV, Parquet, Arrow, packed or not; .npy), a folder or pattern of such files, a
    `save_to_disk` directory, standard input (`-`), a short name or a hub id.

    meant: which column of its rows, where that is not to be found out: `text`, tokens in `input_ids`, chats and
    instructions by their usual names, through the tokenizer's template, or the only column of text; and what of a hub
    dataset. Raises UserError when the source cannot be read, is empty, or does not fill one window.
    """
    path = Path(dataset).expanduser()
    if path.suffix == ".npy" and path.is_file():
        return _pretokenised_array(path, num_windows, length, seed)
    bos = start_token(tokenizer)
    pool: list[int] = []
    documents = 0
    wanted = POOL_FACTOR * num_windows * length

    def made(row: Row) -> Document:
        return document_of(row, meant.column, tokenizer, dataset)

    for tokens in _tokenised(documents_of(dataset, path, seed, made, meant), tokenizer):
        if not tokens:
            continue
        if bos is not None and tokens[0] != bos:
            pool.append(bos)
        pool.extend(tokens)
        documents += 1
        if len(pool) >= wanted:
            break
    found = _cut(torch.tensor(pool), num_windows, length, seed, dataset)
    return Windows(found, dataset, bos, documents={dataset: documents})


def say_if_few(windows: Windows, wanted: int) -> None:
    """Log a warning where a source does not fill as many."""
    count, length = windows.tokens.shape
    if count < wanted:
        logger.warning("calibration data %r fills %d windows of %d, not %d", windows.source, count, length, wanted)


def require_known(tokens: Tensor, vocabulary: int, what: str) -> None:
    """Raises UserError for tokens [...] that a model of so many does not have. what: they are of."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(f"{what} holds tokens {low} to {high}; the model has {vocabulary}")


def start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """BOS, or EOS for tokenizers without one (the prefix lm-eval uses), or None."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None else tokenizer.eos_token_id


def _cut(pool: Tensor, num_windows: int, length: int, seed: int, source: str) -> Tensor:
    """pool: [tokens] -> [n, length], n <= num_windows windows that do not overlap, picked by the seed."""
    available = pool.numel() // length
    if available == 0:
        raise UserError(
            f"calibration data {source!r} holds {pool.numel()} tokens, fewer than one window of {length}: "
            "give more text or lower --max-seq-length"
        )
    grid = pool[: available * length].view(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return grid[order[:num_windows].sort().values].contiguous()


def _tokenised(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for document in documents:
        if isinstance(document, str):
            yield tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        else:
            yield document


def _pretokenised_array(path: Path, num_windows: int, length: int, seed: int) -> Windows:
    import numpy

    try:
        loaded = numpy.load(path)
        if not numpy.issubdtype(loaded.dtype, numpy.integer) or loaded.ndim not in (1, 2):
            raise ValueError(f"{loaded.dtype} of {loaded.ndim} dimensions")
        array = torch.from_numpy(loaded.astype("int64"))
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"calibration file {path} is not integer tokens, [n, time] or one after another: {one_line(error)}"
        ) from error
    if array.ndim == 2 and array.shape[1] < length:
        raise UserError(f"calibration file {path} holds windows of {array.shape[1]} tokens: lower --max-seq-length")
    pool = array[:, :length].reshape(-1) if array.ndim == 2 else array.reshape(-1)
    tokens, documents = _cut(pool, num_windows, length, seed, str(path)), len(array) if array.ndim == 2 else 1
    return Windows(tokens, str(path), None, documents={str(path): documents})
