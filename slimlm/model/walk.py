"""The one loop over a model's blocks, and streams that another process can take up where this one stops.

Everything that goes through a model block by block goes through `walk`: it loads a block and has the next one come,
lets go of it, times it, says so, and records that it is done. Nothing here knows what is done with a block.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from slimlm.checkpoint.journal import Journal, Record, load_tensors, save_tensors
from slimlm.model.block import Block
from slimlm.model.hidden import HiddenStates, Spilled
from slimlm.model.saving import Saver, Saving
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.plain import Json
from slimlm.progress import Progress
from slimlm.ranks import Ranks

logger = logging.getLogger(__name__)
Told = TypeVar("Told")


@dataclass
class Written:
    """What is on its way to this rank's disk. entry: what says where it is, once it is there."""

    index: int
    saving: dict[str, Saving]
    entry: dict[str, Json] | None = None


@dataclass
class Streams:
    """The same windows on their way through one model or more, by label.

    first: the block to go on with. state, figures: what was found out so far, saved along; figures for the manifest.
    """

    name: str
    streams: Mapping[str, Stream]
    journal: Journal
    settle: Callable[[], None]
    saver: Saver = field(default_factory=Saver)
    first: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    _written: Written | None = None

    def __getitem__(self, label: str) -> Stream:
        return self.streams[label]

    @property
    def ranks(self) -> Ranks:
        """That the streams are dealt out to."""
        return next(iter(self.streams.values())).deal.ranks

    def save(self, index: int) -> None:
        """Record that block `index` is done, if it is time to: the hidden states leaving it on all ranks, and all that
        goes with them. They go to the disk while the next block is computed. Raises RunFailure where the last ones
        could not.
        """
        self._conclude_together()
        if not all(self.ranks.gather(self.saver.due())):
            return
        self._conclude_together()  # what was on its way a moment ago
        self.settle()  # blocks before the streams that leave them
        saving: dict[str, Saving] = {}
        for label, stream in self.streams.items():
            assert isinstance(stream.hidden, Spilled)
            saving[label] = stream.hidden.to_save()
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.state.items()}  # it goes on being summed up
        state |= {name: torch.tensor(value, dtype=torch.float64) for name, value in self.figures.items()}
        self._written = Written(index, saving)
        self.saver.start(partial(self._write, self._written, state))
        self._conclude_together()

    def _write(self, written: Written, state: dict[str, Tensor]) -> None:
        saved: dict[str, Json] = {label: part.write() for label, part in written.saving.items()}
        before = self.journal.last(f"streams {self.name}")  # whose state is needed until this is recorded
        entries = before.get("ranks", []) if before else []
        own = entries[self.ranks.rank] if len(entries) == self.ranks.size else None
        place = self._place(next(iter(self.streams.values())).hidden)
        side = 1 if own and own["state"]["file"].startswith(f"{self.name}-state.0") else 0
        written.entry = {"streams": saved, "state": save_tensors(place, f"{self.name}-state.{side}", state)}
        if self.ranks.size == 1:
            self._conclude()

    def finish(self) -> None:
        """Have what is on its way recorded: of several ranks nobody else would."""
        if self.ranks.size > 1:
            self.saver.settle()
            self._conclude()

    def _conclude_together(self) -> None:
        """Of several ranks, who have to ask one another; one alone does so as soon as it has written."""
        if self.ranks.size > 1:
            self._conclude()

    def _conclude(self) -> None:
        """Record what is on the disk, once it is on all ranks'."""
        written = self._written
        if written is None or not all(self.ranks.gather(written.entry is not None)):
            return
        self._written = None
        self.journal.commit(f"streams {self.name}", block=written.index, ranks=self.ranks.gather(written.entry))
        for part in written.saving.values():
            part.done()

    def _place(self, hidden: HiddenStates) -> Path:
        """Where this rank's part of the state is, one of the streams being in these."""
        assert isinstance(hidden, Spilled)
        return self.journal.directory if self.ranks.first else hidden.files[0].path.parent

    def load(self, record: Record, hidden: Mapping[str, tuple[Spilled, torch.dtype]]) -> bool:
        """Take over what `save` recorded, the streams' hidden states being in these; False where any of it is damaged
        on any rank.

        hidden: by label, and the dtype that they are to be of.
        """
        entries = record.get("ranks", [])
        own = entries[self.ranks.rank] if len(entries) == self.ranks.size else {}
        place = self._place(next(iter(hidden.values()))[0])
        state = load_tensors(place, own["state"]) if own else None
        if not all(self.ranks.gather(state is not None and _adopt(own["streams"], hidden))):
            logger.warning("what was saved of %s is gone or changed: it is computed again", self.name)
            return False
        assert state is not None
        self.first = record["block"] + 1
        self.state = {name: tensor for name, tensor in state.items() if tensor.dim()}
        self.figures = {name: float(tensor) for name, tensor in state.items() if not tensor.dim()}
        return True


def _adopt(saved: Mapping[str, Record], hidden: Mapping[str, tuple[Spilled, torch.dtype]]) -> bool:
    """Have the hidden states that were saved; False where they are not what they were."""
    for label, (spilled, wanted) in hidden.items():
        entry = saved[label]
        is_other = bool(entry["shapes"]) and getattr(torch, entry["dtype"]) != wanted
        if is_other or not spilled.adopt(entry):
            return False
    return True


def walk(
    model: StreamedModel,
    progress: Progress,
    stage: str,
    streams: Streams | None = None,
    order: Iterable[int] | None = None,
) -> Iterator[Block]:
    """Blocks of the model with their weights in memory, one after another.

    streams: begins where these are, and saves them behind a block when it is time. order: numbers of blocks, by default
    all from the first to the last.
    """
    indices = list(range(len(model.blocks)) if order is None else order)
    following = dict(pairwise(indices)) if len(indices) == len(set(indices)) else None  # some come again and again
    progress.stage(stage, len(indices), streams.first if streams else 0)
    if streams and streams.first:
        progress.line(f"{stage} goes on behind block {streams.first} of {len(indices)}")
    for index in indices[streams.first if streams else 0 :]:
        block, start = model.blocks[index], time.perf_counter()
        block.facts = {}
        with block.loaded(None if following is None else following.get(index, -1)):
            yield block
        seconds = time.perf_counter() - start
        if streams:
            streams.save(index)
            seconds = max(streams.ranks.gather(time.perf_counter() - start))
        if block.facts is not None:
            progress.done(stage, block.path, seconds, **block.facts)
        progress.step()
    if streams:
        streams.finish()


def untold(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same walk without a line for every block, where one takes no time worth it."""
    for block in blocks:
        block.facts = None
        yield block


def every(model: StreamedModel, tell: Callable[[Block], Told]) -> list[Told]:
    """What each block, without its weights, has to say."""
    return [tell(block) for block in model.blocks]


def leading(model: StreamedModel, says: Callable[[Block], bool]) -> int:
    """How many blocks, from the first on, say yes."""
    return len(list(takewhile(says, model.blocks)))


def picked(values: Sequence[Told], kept: Sequence[int]) -> list[Told]:
    """Of what is said of every block, what is said of those that are kept, by number."""
    return [values[index] for index in kept]


def places(kept: Sequence[int]) -> dict[int, int]:
    """The number each kept block has where only these are left."""
    return {index: place for place, index in enumerate(kept)}


def backwards(model: StreamedModel) -> Iterable[int]:
    """An order for `walk`: from the last block to the first."""
    return range(len(model.blocks) - 1, -1, -1)


def to_the_end(model: StreamedModel, together: int) -> Iterable[int]:
    """An order for `walk`: from every so-manieth block on to the last, again and again."""
    count = len(model.blocks)
    return (index for first in range(0, count, together) for index in range(first, count))
