"""Hidden states on their way to the disk beside the computing, so that another process can go on from them."""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from slimlm.checkpoint.disk import sync
from slimlm.checkpoint.shard import bytes_of
from slimlm.errors import RunFailure
from slimlm.model.waiting import Batch, BatchFile, StreamMemory
from slimlm.plain import Json

SAVE_SECONDS = 60.0  # of work that an interruption may cost, beside the block it comes in
Found = TypeVar("Found")


class Saver:
    """Saves one thing after another beside the computing, `seconds` apart; where that is 0, at once and waited for."""

    seconds: ClassVar[float] = SAVE_SECONDS

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._job: Future[None] | None = None
        self.is_abandoned = False

    def due(self) -> bool:
        """Whether it is time to save again. Raises what went wrong with the last time."""
        if self._job is not None:
            if not self._job.done():
                return False
            self.settle()
        return time.monotonic() - self._started >= self.seconds

    def start(self, job: Callable[[], None]) -> None:
        """Have something saved, after `due` said so."""
        self._started = time.monotonic()
        if self.seconds:
            self._job = self._pool.submit(job)
        else:
            job()

    def settle(self) -> None:
        """Wait until nothing is being saved; raises what went wrong."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self, is_needed: bool) -> None:
        """Have no more saved. is_needed: whether what is being saved may still serve; else it stops halfway."""
        self.is_abandoned = not is_needed
        self._pool.shutdown(wait=True)


@dataclass
class Saving:
    """Batches to be saved in a file, those that are not there yet. done: to be called when a record of it is on the
    disk, too."""

    file: BatchFile
    side: int
    batches: list[Batch]
    saver: Saver
    done: Callable[[], None]

    def write(self) -> dict[str, Json]:
        """Put them on the disk itself, letting go of each; what is returned is what `Spilled.adopt` takes.

        Raises RunFailure on a full disk, or where nobody wants it any more.
        """
        digest, shapes = hashlib.sha256(), [list(batch.shape) for batch in self.batches]
        dtype = self.batches[0].dtype if self.batches else torch.float32
        while self.batches:
            if self.saver.is_abandoned:
                raise RunFailure(f"{self.file.path} was not saved: the run is over")
            batch = self.batches.pop(0)
            if batch.is_whole():
                assert batch.kept is not None
                self.file.write(batch.offset, batch.kept)
                digest.update(bytes_of(batch.kept))
            else:
                for piece in self.file.pieces(batch.offset, batch.nbytes):
                    digest.update(piece)
        sync(self.file.path)
        return {
            "side": self.side,
            "shapes": shapes,
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": digest.hexdigest(),
        }


class Means:
    """The memory, threads and clock that all hidden states of a run share. waits: how often the main thread had to wait
    for a file."""

    def __init__(self, memory: int = 0) -> None:
        self.memory = StreamMemory(memory)
        self.saver = Saver()
        self.reader, self.writer = (ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("read", "write"))
        self.waits = 0

    def wait(self, future: Future[Found]) -> Found:
        """What a thread found. Raises what went wrong there."""
        self.waits += not future.done()
        return future.result()

    def close(self, is_needed: bool = False) -> None:
        """End the threads. is_needed: as for the saver."""
        self.saver.close(is_needed)
        for pool in (self.reader, self.writer):
            pool.shutdown(wait=True)
