"""One safetensors file, read by offset.

Mapping a file into memory counts its pages as this process's own and keeps them while anything refers to them. Plain
reads cost the tensor and nothing else, and leave the operating system to cache the file.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlm.checkpoint.kinds import refuse_stand_in
from slimlm.errors import UserError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 1 << 24
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that lies in a file, or is to be written to one."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """Where a tensor lies. Indexing it reads it whole, which is all that transformers' loader asks of a lazy slice."""

    path: Path
    offset: int

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        if everything is not Ellipsis:
            raise IndexError("a stored tensor is read whole")
        return self.read()

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def read(self, pinned: bool = False) -> Tensor:
        """The tensor, of any shape; for fast copies to a GPU in pinned memory.

        Raises UserError when the file has become shorter than its header says.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype, pin_memory=pinned)
        with self.path.open("rb", buffering=0) as file:
            self._fill(file, self.offset, tensor)
        return tensor

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        """The given rows of the first axis, in that order: [rows, ...]. Raises IndexError for one that is not there."""
        tensor = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        size = self.nbytes // self.shape[0]
        with self.path.open("rb", buffering=0) as file:
            for target, row in zip(tensor, rows, strict=True):
                if not 0 <= row < self.shape[0]:
                    raise IndexError(f"row {row} of a tensor with {self.shape[0]}")
                self._fill(file, self.offset + row * size, target)
        return tensor

    def chunks(self, limit: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """The tensor in runs of rows, [rows, ...], of at most `limit` bytes (one row at least)."""
        if not self.shape:
            yield self.read()
            return
        size = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, limit // size)
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, self.shape[0], step):
                chunk = torch.empty((min(step, self.shape[0] - start), *self.shape[1:]), dtype=self.dtype)
                self._fill(file, self.offset + start * size, chunk)
                yield chunk

    def _fill(self, file: FileIO, offset: int, tensor: Tensor) -> None:
        target = bytes_of(tensor)
        file.seek(offset)
        done = 0
        while done < len(target):
            count = file.readinto(target[done:])
            if not count:
                raise UserError(f"{self.path} ends inside a tensor: fetch it again")
            done += count

    def prefetch(self) -> None:
        """Ask the operating system to have the bytes in its cache soon."""
        if hasattr(os, "posix_fadvise") and self.nbytes:
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor [...] of the CPU: a view, where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_shard(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, none of them read; and why others can never be.

    safetensors itself checks the header (sizes, offsets, overlaps, length of the file). Raises UserError for a file
    that fails that. A dtype slimlm cannot compute with is no fault of a tensor that nothing needs.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        refuse_stand_in(path)
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    tensors, unreadable = {}, {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            unreadable[name] = f"tensor {name} in {path} is stored as {entry['dtype']}, which slimlm cannot compress"
            continue
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]], path, start)
    return tensors, unreadable
