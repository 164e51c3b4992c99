"""The checkpoint that is being made: tensors go to their shards as they come, and finished parts into the journal."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.shard import TensorSpec
from slimlm.checkpoint.writer import MAX_SHARD_BYTES, CheckpointWriter
from slimlm.model.block import Block
from slimlm.model.linears import is_turned
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import leading

Rows = Iterator[Tensor]  # a tensor in runs of rows, for one too large to be held whole


class Result:
    """Tensors in the directory `output`, which are announced with `lay_out` before any is written.

    Waiting for the disk to have a part, and recording it, happens beside the computing of the next.
    """

    def __init__(self, output: Path, journal: Journal, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.output = output
        self.ranks = journal.ranks
        self.journal = journal
        self.max_shard_bytes = max_shard_bytes
        self._writer: CheckpointWriter | None = None
        self._carrier: PreTrainedModel | None = None
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushing: list[Future[None]] = []

    def __enter__(self) -> "Result":
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.shutdown(wait=True)  # nobody writes here any more once the directory is let go of

    def lay_out(self, specs: Mapping[str, TensorSpec], carrier: PreTrainedModel) -> None:
        """Take the disk space for the result's tensors; what an earlier process wrote of the same ones stays.

        carrier: the result's skeleton, which says how its files name and lay out tensors.
        """
        self._carrier = carrier
        if self.ranks.writes:
            self._writer = CheckpointWriter(self.output, specs, self.max_shard_bytes)
        self.ranks.meet()  # the others may read from it

    @property
    def writer(self) -> CheckpointWriter:
        """The shards. Raises ValueError before anything was laid out."""
        if self._writer is None:
            raise ValueError("nothing was laid out to be written")
        return self._writer

    def settle(self) -> None:
        """Wait until all that this rank wrote is on the disk and recorded; raises what went wrong there."""
        while self._flushing:
            self._flushing.pop().result()

    def finish(self) -> None:
        """The same on every rank, and nothing is missing."""
        self.settle()
        if self.ranks.writes:
            self.writer.finish()
        self.ranks.meet()

    def written(self, part: str) -> bool:
        """Whether an earlier process wrote this part of the model, and it is still what it was. For all ranks."""
        record = self.ranks.decided(lambda: self.journal.last(f"written {part}"))
        if record is None:
            return False
        return all(self.ranks.gather(not self.ranks.writes or self.writer.holds(record["sha256"])))

    def leading(self, model: StreamedModel) -> int:
        """How many blocks of the model, from the first on, an earlier process wrote."""
        return leading(model, lambda block: self.written(block.path))

    def write(self, model: StreamedModel, part: str, tensors: Iterable[tuple[str, Tensor | Rows]]) -> None:
        """Write all tensors of a part, (module name, tensor or its rows in runs) each, linears' as [out, in], and
        record that it is finished.

        Each goes to disk as it comes, except in models whose file layout fuses several into one. Nothing is done, nor a
        generator begun, where an earlier process wrote the part.
        """
        if not self.written(part) and self.ranks.writes:
            self.put(model, part, tensors)

    def put(self, model: StreamedModel, part: str, tensors: Iterable[tuple[str, Tensor | Rows]]) -> None:
        """The same, [...] each, for a part that is known not to be there yet; ranks that do not write run a generator,
        too."""
        if not self.ranks.writes:
            for _ in tensors:
                continue
            return
        assert self._carrier is not None
        stored = _as_stored(self._carrier, model.fused, tensors)
        hashes = {key: self.writer.write(key, tensor) for key, tensor in stored}
        self.settle()
        self._flushing.append(self._flusher.submit(self._flush, part, hashes))

    def _flush(self, part: str, hashes: dict[str, str]) -> None:
        self.writer.sync(hashes)
        self.journal.commit(f"written {part}", sha256=hashes)

    def write_block(self, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Write a block's parameters, by name within it; linears' as [out, in]."""
        self.write(block.model, block.path, ((f"{block.path}.{name}", tensor) for name, tensor in tensors.items()))

    def pass_on(
        self, block: Block, stream: Stream, dtype: str = "auto", tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a block and run the stream through it, with the weights as they are stored, so that what rounds off can
        still be made up for.

        dtype: to store them in, where it is not the one that the block's model has them in. tensors: to take instead of
        the block's own, by name within it, linears' as [out, in]; they may be finer. Its own are rounded in place.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in (block.weights() if tensors is None else tensors).items():
            rounded = tensor.to(block.model.stored_dtype(f"{block.path}.{name}", dtype))
            if tensors is None:
                tensor.copy_(rounded)
            else:
                stored[name] = rounded
        self.write_block(block, stored or block.weights())
        with block.placed(stored):
            block.advance(stream)


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
