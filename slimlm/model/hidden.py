"""Where a stream's hidden states wait between blocks: in memory, or in files.

A block reads one batch after another and leaves its output in their place. The files come in pairs, one being read
while the other is written, so that what the last finished block left is whole at any instant.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors


class HiddenStates(Protocol):
    """Batches of hidden states, [batch, time, hidden] each, entering the next block."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def append(self, tensor: Tensor) -> None:
        """Add a batch [batch, time, hidden] while the stream is being started."""

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put a block's output [batch, time, hidden] in its input's place; every batch once, in order, then `turn`."""

    def turn(self) -> None:
        """All batches are replaced: the next block reads them."""


class InMemory(list[Tensor]):
    """Hidden states on the device."""

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put a block's output [batch, time, hidden] in its input's place."""
        self[index] = tensor

    def turn(self) -> None:
        """Nothing is to be done."""


class Spilled:
    """Hidden states in a pair of files `<stem>.0` and `<stem>.1`; one batch at a time is in memory.

    `digest` is the SHA-256 of the file now being read, kept up while it was written where it is `hashed`.
    """

    def __init__(self, stem: Path, device: torch.device | str = "cpu", hashed: bool = True) -> None:
        self.files = [stem.with_name(f"{stem.name}.{side}") for side in (0, 1)]
        self.device = torch.device(device)
        self.hashed = hashed
        self.side = 0
        self.shapes: list[tuple[int, ...]] = []
        self._next: list[tuple[int, ...]] = []  # of the batches being written; a block may change the width
        self.dtype = self._next_dtype = torch.float32
        self.digest = ""
        self._hash = hashlib.sha256()
        for file in self.files:
            with disk_errors(file):
                file.touch()

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @staticmethod
    def _offset(index: int, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> int:
        """Batches are of one size, but for the last."""
        return index * int(torch.Size(shapes[0]).numel()) * dtype.itemsize

    def __getitem__(self, index: int) -> Tensor:
        tensor = torch.empty(self.shapes[index], dtype=self.dtype, pin_memory=self.device.type == "cuda")
        with self.files[self.side].open("rb") as file:
            file.seek(self._offset(index, self.shapes, self.dtype))
            file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor.to(self.device, non_blocking=True)

    def append(self, tensor: Tensor) -> None:
        """Add a batch [batch, time, hidden]. Raises ValueError for one of another size than those before the last."""
        self.dtype = tensor.dtype
        if len(self.shapes) > 1 and self.shapes[-1] != self.shapes[0]:
            raise ValueError(
                f"a batch of {list(tensor.shape)} after one of {list(self.shapes[-1])}: only the last may differ"
            )
        self.shapes.append(tuple(tensor.shape))
        self._write(self.files[self.side], self._offset(len(self.shapes) - 1, self.shapes, self.dtype), tensor)
        self.digest = self._hash.hexdigest()

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put a block's output [batch, time, hidden] in its input's place, in the other file."""
        if index == 0:
            self._hash = hashlib.sha256()
            self._next = []
            self._next_dtype = tensor.dtype
        self._next.append(tuple(tensor.shape))
        self._write(self.files[1 - self.side], self._offset(index, self._next, self._next_dtype), tensor)

    def _write(self, path: Path, offset: int, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if self.hashed:
            self._hash.update(data)
        with disk_errors(path), path.open("r+b") as file:
            if offset == 0:
                file.truncate(0)  # what was there may have been wider
            file.seek(offset)
            file.write(data)

    def turn(self) -> None:
        """Read from now on what was written last."""
        self.side = 1 - self.side
        self.shapes = self._next
        self.dtype = self._next_dtype
        self.digest = self._hash.hexdigest()

    @property
    def file(self) -> Path:
        """The file that holds what the next block reads."""
        return self.files[self.side]

    def adopt(self, side: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, digest: str) -> bool:
        """Take over what another process left in file `side`; False when it is not what `digest` says."""
        self.side, self.shapes, self.dtype, self.digest = side, shapes, dtype, digest
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest


class Forgotten(InMemory):
    """Hidden states nobody will read: for running the embedding only for the blocks' arguments."""

    def append(self, tensor: Tensor) -> None:
        """Let go of a batch [batch, time, hidden]."""


class Scratch:
    """A directory where hidden states wait, for stages that start over when they are interrupted."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self.directory = directory
        self.device = torch.device(device)

    def hidden(self, name: str) -> Spilled:
        """Hidden states that `clear` lets go of."""
        return Spilled(self.directory / f"scratch-{name}", self.device, hashed=False)

    def resumable(self, name: str) -> Spilled:
        """Hidden states that another process can take over."""
        return Spilled(self.directory / name, self.device)

    def clear(self, names: str = "*") -> None:
        """Let go of what `hidden` made whose names match the pattern."""
        for path in self.directory.glob(f"scratch-{names}"):
            path.unlink()
