"""What batches of hidden states wait in: memory of a stated size, and files."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import torch
from torch import Tensor

from slimlm.checkpoint.disk import disk_errors
from slimlm.checkpoint.shard import bytes_of
from slimlm.errors import RunFailure

PIECE = 1 << 20  # bytes
Copied = tuple[Tensor, torch.cuda.Event | None]


class StreamMemory:
    """Bytes of memory that hidden states may take while they wait; peak: the most that they took."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = self.peak = 0
        self._lock = RLock()  # what is given back may be while something is taken, and in any thread

    def take(self, count: int, leaving: int = 0) -> "Taken | None":
        """So many bytes, until nobody has what is returned any more; None where not as many and `leaving` are left."""
        with self._lock:
            if self.used + count + leaving > self.size:
                return None
            self.used += count
            self.peak = max(self.peak, self.used)
        return Taken(self, count)

    def _give_back(self, count: int) -> None:
        with self._lock:
            self.used -= count


@dataclass(frozen=True)
class Taken:
    """A part of a memory, given back with the last reference to this."""

    memory: StreamMemory
    count: int

    def __del__(self) -> None:
        self.memory._give_back(self.count)


@dataclass(frozen=True)
class BatchFile:
    """A file that batches are written to, and read from, at places of their own."""

    path: Path

    def begin(self) -> None:
        """Make it an empty one. Raises RunFailure on a full disk."""
        with disk_errors(self.path):
            self.path.open("wb").close()

    def write(self, offset: int, tensor: Tensor) -> None:
        """Put a tensor [...] of the CPU there. Raises RunFailure on a full disk."""
        with disk_errors(self.path), self.path.open("r+b") as file:
            file.seek(offset)
            file.write(bytes_of(tensor))

    def read(self, offset: int, into: Tensor) -> Tensor:
        """Fill a tensor [...] of the CPU from there. Raises RunFailure where the file has not as much."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                if file.readinto(bytes_of(into)) == into.nbytes:
                    return into
        except OSError as error:
            raise RunFailure(f"cannot read {self.path}: {error.strerror or error}") from error
        raise RunFailure(f"cannot read {self.path}: it ends too early")

    def pieces(self, offset: int, count: int) -> Iterator[bytes]:
        """So many bytes from there, a few at a time. Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(offset)
            for start in range(0, count, PIECE):
                yield file.read(min(PIECE, count - start))


def on_host(tensor: Tensor) -> Copied:
    """A tensor [...] on the CPU, contiguous, and what says when it has come: the same one, or a GPU's copy, which is
    pinned and not waited for."""
    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host, torch.cuda.current_stream(tensor.device).record_event()


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch that waits, and never changes. kept: its numbers, [batch, time, hidden], on the CPU (pinned for a GPU);
    None where they are in a file, at `offset`.

    taken: the memory, given back with the batch. ready: when a GPU's copy has come. version: of `kept`, which whoever
    writes into what a block is given would raise.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    kept: Tensor | None = None
    taken: Taken | None = None
    ready: torch.cuda.Event | None = None
    version: int = 0

    @property
    def nbytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def is_whole(self) -> bool:
        """Whether what is kept can be read by the CPU, for which a GPU's copy is waited for.

        Raises RunFailure where it was changed.
        """
        if self.kept is None:
            return False
        if self.ready is not None:
            self.ready.synchronize()
        if self.kept._version != self.version:
            raise RunFailure("this model writes into hidden states that are still to be read: use --stream-memory 0")
        return True
