"""Calibration data: any text source -> token windows [n, time], the same for the same seed, with a hash.

Documents are shuffled by the seed, tokenised without the tokenizer's own special tokens, each preceded by one BOS
(EOS where the tokenizer has no BOS, nothing where it has neither), joined, and cut into windows of equal length, of
which the seed picks n. There is no padding.
"""

import hashlib
import inspect
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.errors import UserError, nearest, one_line

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "<|endoftext|>"
POOL_FACTOR = 16  # windows are picked from this many times as many, where the source has them
SAMPLING_BATCH = 32

HUB_SHORT_NAMES: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},  # one row a line
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    "alpaca": {"path": "tatsu-lab/alpaca", "split": "train"},
    "fineweb-edu": {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "split": "train"},
}
JOINED = ("wikitext2",)  # the rows, in order and with blank lines between them, are one document, as everyone has it
SELF = "self"


@dataclass(frozen=True)
class Windows:
    """tokens: [n, time]. source: where they came from. bos: the token each document starts with, or None."""

    tokens: Tensor
    source: str
    bos: int | None

    @property
    def sha256(self) -> str:
        """Hash of shape and tokens."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batches(self, size: int) -> list[Tensor]:
        return list(self.tokens.split(size))


def load_windows(
    dataset: str,
    tokenizer: Any,
    num_windows: int,
    length: int,
    seed: int = 0,
    text_column: str = "text",
) -> Windows:
    """Windows from a file (.txt, .jsonl, .parquet, .npy), a `save_to_disk` directory, a short name or a hub id.

    A dataset with an `input_ids` column (and no text column) is taken as tokens. Raises UserError when the source
    cannot be read, is empty, or does not fill one window.
    """
    path = Path(dataset).expanduser()
    if path.suffix == ".npy" and path.is_file():
        return _pretokenised_array(path, num_windows, length, seed)
    bos = start_token(tokenizer)
    pool: list[int] = []
    wanted = POOL_FACTOR * num_windows * length
    for tokens in _tokenised(_documents(dataset, path, text_column, seed), tokenizer):
        if not tokens:
            continue
        if bos is not None and tokens[0] != bos:
            pool.append(bos)
        pool.extend(tokens)
        if len(pool) >= wanted:
            break
    return Windows(_cut(torch.tensor(pool), num_windows, length, seed, dataset), dataset, bos)


def start_token(tokenizer: Any) -> int | None:
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
    if available < num_windows:
        logger.warning("calibration data %r fills %d windows of %d, not %d", source, available, length, num_windows)
    grid = pool[: available * length].view(available, length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return grid[order[:num_windows].sort().values].contiguous()


def _tokenised(documents: Iterable[str | list[int]], tokenizer: Any) -> Iterator[list[int]]:
    for document in documents:
        if isinstance(document, str):
            yield tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        else:
            yield document


def _documents(dataset: str, path: Path, text_column: str, seed: int) -> Iterator[str | list[int]]:
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


def _local_documents(path: Path, text_column: str) -> list[str | list[int]]:
    reader = _FILE_READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"calibration file {path} is none of {', '.join(sorted([*_FILE_READERS, '.npy']))}")
    try:
        return reader(path, text_column)
    except (OSError, ValueError) as error:
        raise UserError(f"calibration file {path} cannot be read: {one_line(error)}") from error


def _read_text(path: Path, text_column: str) -> list[str | list[int]]:
    return split_documents(path.read_text(encoding="utf-8"))


def split_documents(text: str) -> list[str | list[int]]:
    """Documents of a plain text, separated by lines that hold only `<|endoftext|>`; one where there are none."""
    documents = ("\n" + text + "\n").split(f"\n{DOCUMENT_SEPARATOR}\n")
    return [document.strip("\n") for document in documents if document.strip()]


def _read_jsonl(path: Path, text_column: str) -> list[str | list[int]]:
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file if line.strip())
        return [_row_content(row, text_column, str(path)) for row in rows]


def _read_parquet(path: Path, text_column: str) -> list[str | list[int]]:
    import pyarrow.parquet

    columns = pyarrow.parquet.read_schema(path).names
    column = text_column if text_column in columns else "input_ids"
    if column not in columns:
        raise _no_column(text_column, columns, str(path))
    table = pyarrow.parquet.read_table(path, columns=[column])
    return [_checked(content, column, str(path)) for content in table.column(column).to_pylist()]


_FILE_READERS: dict[str, Callable[[Path, str], list[str | list[int]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _row_content(row: Any, text_column: str, source: str) -> str | list[int]:
    if not isinstance(row, dict) or (text_column not in row and "input_ids" not in row):
        raise _no_column(text_column, row if isinstance(row, dict) else [], source)
    column = text_column if text_column in row else "input_ids"
    return _checked(row[column], column, source)


def _checked(content: Any, column: str, source: str) -> str | list[int]:
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


def _dataset_rows(dataset: str, rows: Any, text_column: str) -> Iterator[str | list[int]]:
    """Rows of a datasets.Dataset, or of the one or train split of a DatasetDict."""
    if hasattr(rows, "keys"):
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
    return Windows(_cut(pool, num_windows, length, seed, str(path)), str(path), None)


@torch.no_grad()
def sample_windows(
    model: Any,
    tokenizer: Any,
    num_windows: int,
    length: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Windows:
    """Windows the model itself writes: ancestral samples at temperature 1, each beginning with BOS.

    Self-calibration, arXiv 2410.17170; they schedule the temperature, we keep 1, at which samples follow the model's
    own distribution. EOS does not end a window: what follows it is the beginning of another document. `model` is whole
    and in memory, as autoregressive sampling needs it. Raises UserError for a tokenizer with neither BOS nor EOS.
    """
    bos = start_token(tokenizer)
    if bos is None:
        raise UserError("--dataset self needs a tokenizer with a BOS or EOS token to start from: give a text instead")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    windows = []
    for start in range(0, num_windows, SAMPLING_BATCH):
        count = min(SAMPLING_BATCH, num_windows - start)
        windows.append(_sample(model, count, length, bos, generator))
        advance(count)
    return Windows(torch.cat(windows), SELF, bos)


def _sample(model: Any, count: int, length: int, bos: int, generator: torch.Generator) -> Tensor:
    """[count, length] tokens, position 0 BOS."""
    tokens = torch.full((count, 1), bos, device=model.device)
    # transformers calls it `cache` since 5.24, and code that comes with a model may be older.
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    cache = None
    columns = [tokens]
    for _ in range(length - 1):
        out = model(input_ids=columns[-1], use_cache=True, logits_to_keep=1, **{name: cache})
        cache = out[name]
        probabilities = out.logits[:, -1].float().softmax(-1)
        columns.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(columns, dim=1).cpu()
