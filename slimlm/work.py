"""A run's work in progress: results go to their shard as they come, and finished steps into the journal."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from slimlm.activations import Spilled
from slimlm.checkpoint.disk import sync
from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.writer import CheckpointWriter
from slimlm.progress import Progress
from slimlm.walk import Stream, StreamedModel

logger = logging.getLogger(__name__)
Rows = Iterator[Tensor]  # a tensor in runs of rows, for one too large to be held whole


class Forgotten:
    """Hidden states nobody will read: for running the embedding only for the blocks' arguments."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> Tensor:
        raise IndexError(index)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())

    def append(self, tensor: Tensor) -> None:
        pass

    def replace(self, index: int, tensor: Tensor) -> None:
        raise IndexError(index)

    def turn(self) -> None:
        pass


@dataclass(frozen=True)
class Work:
    """What a method gets besides the model: a place for results, for finished steps, and for hidden states.

    Waiting for the disk to have a part, and recording it, happens beside the computing of the next.
    """

    writer: CheckpointWriter
    journal: Journal
    progress: Progress
    _flusher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="flush"))
    _flushing: list[Future[None]] = field(default_factory=list)

    def settle(self) -> None:
        """Wait until all that was written is on the disk and recorded; raises what went wrong there."""
        while self._flushing:
            self._flushing.pop().result()

    @property
    def directory(self) -> Path:
        return self.journal.directory

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.shutdown(wait=True)  # nobody writes here any more once the directory is let go of

    def written(self, part: str) -> bool:
        """Whether an earlier process wrote this part of the model, and it is still what it was."""
        record = self.journal.last(f"written {part}")
        return record is not None and self.writer.holds(record["sha256"])

    def write(self, model: StreamedModel, part: str, tensors: Iterable[tuple[str, Tensor | Rows]]) -> None:
        """Write all tensors of a part, (module name, tensor or its rows in runs) each, and record that it is finished.

        Each goes to disk as it comes, except in models whose file layout fuses several into one.
        """
        hashes = {}
        for key, tensor in _as_stored(model, tensors):
            hashes[key] = self.writer.write(key, tensor)
        self.settle()
        self._flushing.append(self._flusher.submit(self._flush, part, hashes))

    def _flush(self, part: str, hashes: dict[str, str]) -> None:
        self.writer.sync(hashes)
        self.journal.commit(f"written {part}", sha256=hashes)

    def start_stream(
        self, model: StreamedModel, name: str, batches: list[Tensor], whole: int | None = None
    ) -> tuple[Stream, dict[str, Tensor], int]:
        """A stream for `batches`, the state saved with it, and the block to go on with.

        That is the first block and an empty state, or where an earlier process's `save_stream` left off, unless that is
        beyond the `whole` leading blocks whose results are known to be intact.
        """
        record = self.journal.last(f"stream {name}")
        if record is not None and (whole is None or record["block"] < whole):
            hidden = Spilled(self.directory / name, model.device)
            shapes = [tuple(shape) for shape in record["shapes"]]
            state = self.journal.load(record["state"])
            dtype: torch.dtype = getattr(torch, record["dtype"])
            if state is not None and hidden.adopt(record["side"], shapes, dtype, record["sha256"]):
                stream = model.embed(batches, Forgotten())
                stream.hidden = hidden
                return stream, state, record["block"] + 1
            logger.warning("what was saved of %s is damaged: it is computed again", name)
        return model.embed(batches, Spilled(self.directory / name, model.device)), {}, 0

    def save_stream(self, name: str, block: int, stream: Stream, state: dict[str, Tensor]) -> None:
        """Record that `block` is done: the hidden states leaving it, and the state that goes with them."""
        hidden = stream.hidden
        assert isinstance(hidden, Spilled)
        self.settle()
        sync(hidden.file)
        self.journal.commit(
            f"stream {name}",
            block=block,
            side=hidden.side,
            shapes=hidden.shapes,
            dtype=str(hidden.dtype).removeprefix("torch."),
            sha256=hidden.digest,
            state=self.journal.save(f"{name}-state.{block % 2}", state),
        )


def _as_stored(
    model: StreamedModel, tensors: Iterable[tuple[str, Tensor | Rows]]
) -> Iterator[tuple[str, Tensor | Rows]]:
    """Module tensors under the names and in the layout of the files."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            yield model.file_name(name), tensor
        elif model.fused:
            whole[name] = tensor
        else:
            yield from checkpoint_tensors(model.model, {name: tensor}).items()
    yield from checkpoint_tensors(model.model, whole).items()
