"""Where a stream's hidden states wait between blocks: in memory as far as there is room, the rest in files.

A block reads one batch after another and leaves its output in their place. What is in a file is read by a thread while
the batch before it is computed, and written by another. The files change places, so that what a block reads, what it
writes and what was saved last are three. Saving is what another process goes on from: a file with all batches.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from slimlm.checkpoint.journal import Record
from slimlm.checkpoint.shard import bytes_of
from slimlm.device import available_memory
from slimlm.errors import RunFailure
from slimlm.model.saving import Means, Saving
from slimlm.model.waiting import Batch, BatchFile, Copied, Taken, on_host
from slimlm.started import local_size, world_size

SHARE = 4  # of the memory that is free at the start, the streams get one such part
SIDES = 3  # files of a stream that is saved; others need two
OF_SEVERAL = 4  # of several processes, where what is saved has to wait for the others to be so, too
AHEAD = 4  # batches' worth of memory that is left for reading and writing ahead


def sides() -> int:
    """Files that a stream that is saved may need at once."""
    return OF_SEVERAL if world_size() > 1 else SIDES


class InMemory(list[Tensor]):
    """Hidden states on the device."""

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put a block's output [batch, time, hidden] in its input's place."""
        self[index] = tensor

    def turn(self) -> None:
        """Nothing is to be done."""


class Forgotten(InMemory):
    """Hidden states nobody will read: for running the embedding only for the blocks' arguments."""

    def append(self, tensor: Tensor) -> None:
        """Let go of a batch [batch, time, hidden]."""


class Spilled:
    """Hidden states in memory, and in files `<stem>.0` to `<stem>.2` as far as that does not suffice.

    side: the file of what is in one. saved, saving: those that another process goes on from, and will.
    """

    def __init__(self, stem: Path, device: torch.device | str = "cpu", means: Means | None = None) -> None:
        self.files = [BatchFile(stem.with_name(f"{stem.name}.{side}")) for side in range(sides())]
        self.device = torch.device(device)
        self.means = means or Means()
        self.side: int | None = None
        self.saved: int | None = None
        self.saving: int | None = None
        self._batches: list[Batch | None] = []  # None for one that was replaced
        self._next: list[Batch] = []
        self._next_side: int | None = None
        self._writes: list[Future[None]] = []
        self._ahead: tuple[int, Future[Tensor], Taken] | None = None
        self._last = -1  # read

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        batch = self._batches[index]
        if batch is None:
            raise ValueError(f"batch {index} was replaced, and the stream has not turned")
        if batch.kept is None:
            host = self._from_file(index, batch)
        else:
            assert self._on_gpu or batch.is_whole()  # a GPU copies there and back in order
            host = batch.kept
        if index in (0, self._last + 1):  # in order, and so it will go on
            self._read_ahead(index)
        self._last = index
        # Not the kept tensor itself, which whoever wants gradients changes.
        return host.detach() if self.device.type == "cpu" else host.to(self.device, non_blocking=True)

    def append(self, tensor: Tensor) -> None:
        """Add a batch [batch, time, hidden]. Raises ValueError for one of another size than those before the last."""
        shapes = self.shapes
        if len(shapes) > 1 and shapes[-1] != shapes[0]:
            raise ValueError(
                f"a batch of {list(tensor.shape)} after one of {list(shapes[-1])}: only the last may differ"
            )
        placed = self._placed(tensor, [batch for batch in self._batches if batch])
        if placed.kept is None:
            self.side = self._begun() if self.side is None else self.side
            self._write(self.side, placed, tensor)
        self._batches.append(placed)

    def replace(self, index: int, tensor: Tensor) -> None:
        """Put a block's output [batch, time, hidden] in its input's place, which is let go of."""
        if index == 0:
            self._wait_for_writes()  # of what was appended, which is read from now on
            self._next, self._next_side = [], None
        if index < len(self._batches):
            self._batches[index] = None
        placed = self._placed(tensor, self._next)
        if placed.kept is None:
            self._next_side = self._begun() if self._next_side is None else self._next_side
            self._write(self._next_side, placed, tensor)
        self._next.append(placed)

    def turn(self) -> None:
        """Read from now on what was written last. Raises RunFailure where it could not be written."""
        self._wait_for_writes()
        self._batches, self.side = [*self._next], self._next_side
        self._next, self._next_side = [], None
        self._ahead, self._last = None, -1
        self._read_ahead(-1)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all batches."""
        return [batch.shape for batch in self._batches if batch]

    def to_save(self) -> Saving:
        """What the next block reads, for another thread to put on the disk while this one goes on."""
        self._wait_for_writes()
        side = self.side = self._begun() if self.side is None else self.side

        def done() -> None:
            self.saved, self.saving = side, None

        self.saving = side
        return Saving(self.files[side], side, [batch for batch in self._batches if batch], self.means.saver, done)

    def adopt(self, saved: Record) -> bool:
        """Take over what another process saved; False when that is not what is there."""
        self.side = self.saved = saved["side"]
        digest, found, dtype = hashlib.sha256(), list[Batch](), getattr(torch, saved["dtype"])
        for shape in map(tuple, saved["shapes"]):
            try:
                host = self._read(saved["side"], Batch(shape, dtype, _behind(found)))
            except RunFailure:  # the file is gone or too short
                return False
            digest.update(bytes_of(host))
            found.append(self._placed(host, found))
        self._batches = [*found]
        return bool(digest.hexdigest() == saved["sha256"])

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _footprint(self, batch: Batch) -> int:
        """Bytes of memory that its numbers take: what is pinned comes in powers of two."""
        return 1 << (batch.nbytes - 1).bit_length() if self._on_gpu and batch.nbytes else batch.nbytes

    def _placed(self, tensor: Tensor, earlier: Sequence[Batch]) -> Batch:
        """A batch [batch, time, hidden] behind those earlier ones, in memory if there is room."""
        batch = Batch(tuple(tensor.shape), tensor.dtype, _behind(earlier))
        size = self._footprint(batch)
        taken = self.means.memory.take(size, leaving=AHEAD * size)
        if taken is None:
            return batch
        host, ready = on_host(tensor)
        if host.untyped_storage().nbytes() > host.nbytes:  # a part of something larger, all of which would stay
            host = host.clone()
        return replace(batch, kept=host, taken=taken, ready=ready, version=host._version)

    def _write(self, side: int, batch: Batch, tensor: Tensor) -> None:
        """In the thread that writes; in this one where there is no memory to wait in."""
        taken = self.means.memory.take(self._footprint(batch))
        write = partial(_write, self.files[side], batch.offset, on_host(tensor), taken)
        if taken is None:
            self.means.waits += 1
            write()
        else:
            self._writes.append(self.means.writer.submit(write))

    def _wait_for_writes(self) -> None:
        writes, self._writes = self._writes, []
        for future in writes:
            self.means.wait(future)

    def _begun(self) -> int:
        """An empty file that nobody needs. Raises RunFailure on a full disk, or where saving failed."""
        if len({self.side, self.saved, self.saving} - {None}) == len(self.files):
            self.means.saver.settle()  # after which what was saved before is not needed
        side = min(set(range(len(self.files))) - {self.side, self.saved, self.saving})
        self.files[side].begin()
        return side

    def _from_file(self, index: int, batch: Batch) -> Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return self.means.wait(ahead[1])
        self.means.waits += 1
        if not self._next:
            self._wait_for_writes()  # of batches that were appended
        assert self.side is not None
        return self._read(self.side, batch)

    def _read(self, side: int, batch: Batch) -> Tensor:
        into = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=self._on_gpu)
        return self.files[side].read(batch.offset, into)

    def _read_ahead(self, index: int) -> None:
        """Have the next batch behind that one that is in a file read."""
        is_started = not self._writes or bool(self._next)  # else batches are still being appended
        if self.side is None or self._ahead is not None or not is_started:
            return
        following = ((n, self._batches[n]) for n in range(index + 1, len(self)))
        found = next(((n, batch) for n, batch in following if batch and batch.kept is None), None)
        taken = found and self.means.memory.take(self._footprint(found[1]))
        if found and taken:
            self._ahead = found[0], self.means.reader.submit(self._read, self.side, found[1]), taken


HiddenStates = InMemory | Spilled  # batches, [batch, time, hidden] each, entering the next block


def _behind(earlier: Sequence[Batch]) -> int:
    """Where in a file the next batch begins: all are of one size, but for the last."""
    return len(earlier) * earlier[0].nbytes if earlier else 0


def _write(file: BatchFile, offset: int, copied: Copied, taken: Taken | None) -> None:
    """taken: what the copy takes of the memory meanwhile."""
    host, ready = copied
    if ready is not None:
        ready.synchronize()
    file.write(offset, host)


class Scratch:
    """A directory where hidden states wait that memory has no room for, and where they are saved.

    memory: bytes that those of all processes of a machine may take of it; a quarter of what is free by default.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu", memory: int | None = None) -> None:
        self.directory = directory
        self.device = torch.device(device)
        room = available_memory(torch.device("cpu"))["host"] // SHARE if memory is None else memory
        self.means = Means(room // local_size())

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.means.close(is_needed=kind is not None)

    def hidden(self, name: str) -> Spilled:
        """Hidden states that `clear` lets go of, for stages that start over when they are interrupted."""
        return self.resumable(f"scratch-{name}")

    def resumable(self, name: str) -> Spilled:
        """Hidden states that another process can take over."""
        return Spilled(self.directory / name, self.device, self.means)

    def clear(self, names: str = "*") -> None:
        """Let go of what `hidden` made whose names match the pattern."""
        for path in self.directory.glob(f"scratch-{names}"):
            path.unlink()
