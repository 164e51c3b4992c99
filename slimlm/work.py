"""A run's work in progress: results go to their shard as they come, and finished steps into the journal."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.activations import Spilled
from slimlm.checkpoint.disk import sync
from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.journal import Journal, Record
from slimlm.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter, TensorSpec
from slimlm.matrices import is_turned
from slimlm.progress import Progress
from slimlm.stream import Stream
from slimlm.walk import StreamedModel

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


@dataclass
class Work:
    """What a method gets besides the model: a place for results, for finished steps, and for hidden states.

    output: directory for the checkpoint, whose tensors a method announces with `lay_out` before it writes any.
    waiting: where hidden states wait, the journal's directory if not elsewhere.
    Waiting for the disk to have a part, and recording it, happens beside the computing of the next.
    """

    output: Path
    journal: Journal
    progress: Progress
    waiting: Path | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    _writer: CheckpointWriter | None = None
    _carrier: PreTrainedModel | None = None
    _flusher: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="flush"))
    _flushing: list[Future[None]] = field(default_factory=list)

    def settle(self) -> None:
        """Wait until all that was written is on the disk and recorded; raises what went wrong there."""
        while self._flushing:
            self._flushing.pop().result()

    @property
    def directory(self) -> Path:
        """Where hidden states wait."""
        return self.waiting or self.journal.directory

    def lay_out(self, specs: Mapping[str, TensorSpec], carrier: PreTrainedModel) -> None:
        """Take the disk space for the result's tensors; what an earlier process wrote of the same ones stays.

        carrier: the result's skeleton, which says how its files name and lay out tensors.
        """
        self._writer = CheckpointWriter(self.output, specs, self.max_shard_bytes)
        self._carrier = carrier

    @property
    def writer(self) -> CheckpointWriter:
        if self._writer is None:
            raise ValueError("nothing was laid out to be written")
        return self._writer

    def scratch(self, name: str, device: torch.device) -> Spilled:
        """Hidden states that wait on disk, for a stage that starts over when it is interrupted."""
        return Spilled(self.directory / f"scratch-{name}", device, hashed=False)

    def clear_scratch(self, names: str = "*") -> None:
        """Let go of hidden states made by `scratch` whose names match the pattern."""
        for path in self.directory.glob(f"scratch-{names}"):
            path.unlink()

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.shutdown(wait=True)  # nobody writes here any more once the directory is let go of

    def written(self, part: str) -> bool:
        """Whether an earlier process wrote this part of the model, and it is still what it was."""
        record = self.journal.last(f"written {part}")
        return record is not None and self.writer.holds(record["sha256"])

    def leading(self, model: StreamedModel) -> int:
        """How many blocks of the model, from the first on, an earlier process wrote."""
        return len(list(takewhile(self.written, map(model.family.block, range(len(model.blocks))))))

    def write(self, model: StreamedModel, part: str, tensors: Iterable[tuple[str, Tensor | Rows]]) -> None:
        """Write all tensors of a part, (module name, tensor or its rows in runs) each, and record that it is finished.

        Each goes to disk as it comes, except in models whose file layout fuses several into one.
        """
        hashes = {}
        assert self._carrier is not None
        for key, tensor in _as_stored(self._carrier, model.fused, tensors):
            hashes[key] = self.writer.write(key, tensor)
        self.settle()
        self._flushing.append(self._flusher.submit(self._flush, part, hashes))

    def pass_through(
        self, model: StreamedModel, index: int, tensors: Mapping[str, Tensor], stream: Stream, dtype: str = "auto"
    ) -> None:
        """`pass_on` with these weights, by names within the block, instead of the model's own: they may be finer."""
        part = model.family.block(index)
        stored = {name: tensor.to(model.stored_dtype(f"{part}.{name}", dtype)) for name, tensor in tensors.items()}
        if not self.written(part):
            self.write(model, part, ((f"{part}.{name}", tensor) for name, tensor in stored.items()))
        with model.placed(part, stored):
            model.advance(index, stream)

    def pass_on(self, model: StreamedModel, index: int, stream: Stream, dtype: str = "auto") -> None:
        """Write block `index`, its weights loaded, and run the stream through it.

        The stream sees the weights as they are stored, so that what rounds off can still be made up for: they are
        rounded in place. dtype: to store them in, where it is not the one that `model` has them in.
        """
        part = model.family.block(index)
        weights = {f"{part}.{name}": tensor for name, tensor in model.weights(index).items()}
        for name, tensor in weights.items():
            tensor.copy_(tensor.to(model.stored_dtype(name, dtype)))
        if not self.written(part):
            self.write(model, part, weights.items())
        model.advance(index, stream)

    def _flush(self, part: str, hashes: dict[str, str]) -> None:
        self.writer.sync(hashes)
        self.journal.commit(f"written {part}", sha256=hashes)

    def start_streams(
        self, name: str, starts: Mapping[str, tuple[StreamedModel, list[Tensor]]], whole: int | None = None
    ) -> tuple[dict[str, Stream], dict[str, Tensor], int]:
        """Streams for batches through models, by label; the state saved with them, and the block to go on with.

        That is the first block and an empty state, or where an earlier process's `save_streams` left off, unless that
        is beyond the `whole` leading blocks whose results are known to be intact.
        """
        record = self.journal.last(f"streams {name}")
        if record is not None and (whole is None or record["block"] < whole):
            state = self.journal.load(record["state"])
            hidden = {label: self._adopted(name, label, record["streams"][label], starts[label][0]) for label in starts}
            if state is not None and all(hidden.values()):
                streams = {label: model.embed(batches, Forgotten()) for label, (model, batches) in starts.items()}
                for label, stream in streams.items():
                    stream.hidden = hidden[label]  # type: ignore[assignment]
                return streams, state, record["block"] + 1
            logger.warning("what was saved of %s is gone or changed: it is computed again", name)
        streams = {
            label: model.embed(batches, Spilled(self.directory / f"{name}-{label}", model.device))
            for label, (model, batches) in starts.items()
        }
        return streams, {}, 0

    def _adopted(self, name: str, label: str, saved: Record, model: StreamedModel) -> Spilled | None:
        hidden = Spilled(self.directory / f"{name}-{label}", model.device)
        shapes, dtype = [tuple(shape) for shape in saved["shapes"]], getattr(torch, saved["dtype"])
        intact = dtype == model.dtype and hidden.adopt(saved["side"], shapes, dtype, saved["sha256"])
        return hidden if intact else None

    def save_streams(self, name: str, block: int, streams: Mapping[str, Stream], state: dict[str, Tensor]) -> None:
        """Record that `block` is done: the hidden states leaving it, and the state that goes with them."""
        saved = {}
        self.settle()
        for label, stream in streams.items():
            hidden = stream.hidden
            assert isinstance(hidden, Spilled)
            sync(hidden.file)
            saved[label] = {
                "side": hidden.side,
                "shapes": hidden.shapes,
                "dtype": str(hidden.dtype).removeprefix("torch."),
                "sha256": hidden.digest,
            }
        stored = self.journal.save(f"{name}-state.{block % 2}", state)
        self.journal.commit(f"streams {name}", block=block, streams=saved, state=stored)


def as_state(figures: Mapping[str, float]) -> dict[str, Tensor]:
    """Figures as `save_streams` keeps them."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def as_figures(state: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures as `start_streams` brings them back."""
    return {name: float(value) for name, value in state.items()}


def _as_stored(
    carrier: PreTrainedModel, fused: bool, tensors: Iterable[tuple[str, Tensor | Rows]]
) -> Iterator[tuple[str, Tensor | Rows]]:
    """Module tensors, linears' as [out, in], under the names and in the layout of the files.

    fused: whether these have several tensors where modules have one, or the other way round.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            (key,) = checkpoint_tensors(carrier, {name: carrier.state_dict()[name]})
            yield key, tensor
            continue
        turned = tensor.T if is_turned(carrier, name) else tensor
        if fused:
            whole[name] = turned
        else:
            yield from checkpoint_tensors(carrier, {name: turned}).items()
    yield from checkpoint_tensors(carrier, whole).items()
