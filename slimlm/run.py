"""One run of a method: what it gets, what it plans before any work, what it found out after it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slimlm.calibration import Windows
from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.journal import Journal
from slimlm.checkpoint.shard import TensorSpec
from slimlm.model.block import Block
from slimlm.model.ends import embed
from slimlm.model.hidden import Forgotten, HiddenStates, Scratch
from slimlm.model.result import Result
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import Streams, walk
from slimlm.modeling import own_files
from slimlm.progress import Progress
from slimlm.ranks import ALONE, Ranks
from slimlm.recipe import Step


@dataclass(frozen=True)
class Plan:
    """The result's config and tensors (names as in its files), and what of the config changes.

    carrier: the result's skeleton, which says how its files name and lay out tensors.
    widths: those inside blocks and of the stream, as `--widths` takes them, where they change or may.
    remark: what is still to be decided in the run, and how. files: what else belongs into the checkpoint.
    """

    config: PretrainedConfig
    tensors: dict[str, TensorSpec]
    parameters: int
    carrier: PreTrainedModel
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    remark: str | None = None
    widths: str | None = None
    files: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls,
        model: StreamedModel,
        config: PretrainedConfig,
        carrier: PreTrainedModel,
        tensors: Mapping[str, Tensor],
        dtype: str,
    ) -> "Plan":
        """For the carrier's tensors, [...] by name in its modules. dtype: to write in. Sets the config's."""
        specs = {
            name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, dtype))
            for name, tensor in checkpoint_tensors(carrier, tensors).items()
        }
        config.dtype = next(iter(specs.values())).dtype
        parameters = sum(torch.Size(spec.shape).numel() for spec in specs.values())
        return cls(config, specs, parameters, carrier, files=own_files(config))

    @classmethod
    def like(cls, model: StreamedModel, dtype: str) -> "Plan":
        """Of the same tensors with other numbers."""
        tied = model.model.all_tied_weights_keys
        named = {name: tensor for name, tensor in model.model.state_dict().items() if name not in tied}
        return cls.of(model, copy.deepcopy(model.config), model.model, named, dtype)


@dataclass(frozen=True)
class Outcome:
    """What a run found out.

    plan: what it carried out, in which widths may have been settled that were still open. notes: figures for the
    manifest. basis: [hidden, width], where the stream was moved to, if it was; of each block's end, by number, where it
    is not everywhere the same. blocks: the dense model's blocks that are still there, by number; None for all. zeros:
    share of zeros in the matrices a method prunes, counted on disk; None for one that prunes none.
    """

    plan: Plan
    notes: dict[str, Any] = field(default_factory=dict)
    basis: Tensor | Callable[[int], Tensor] | None = None
    blocks: tuple[int, ...] | None = None
    zeros: float | None = None


S = TypeVar("S", bound=Step)
Known = Mapping[str, Tensor]  # of a block, [...] each


def nothing(index: int) -> Known:
    """What is known of a block without data."""
    return {}


@dataclass
class Run(Generic[S]):
    """What a method carries out: a resolved recipe, on a model, with calibration windows in batches [batch, time], into
    a result; hidden states that wait are in `scratch`. All ranks have the same batches, and their streams some of them.
    windows: those in the batches; None where there are none. dense: what the result is to be like, where the model is
    not the dense one itself. Only a wing's `run.py` takes one."""

    recipe: S
    model: StreamedModel
    plan: Plan
    batches: list[Tensor]
    result: Result
    scratch: Scratch
    progress: Progress
    ranks: Ranks = ALONE
    windows: Windows | None = None
    dense: StreamedModel | None = None

    @cached_property
    def journal(self) -> Journal:
        """Of finished steps."""
        return self.result.journal

    def walk(self, stage: str, streams: Streams | None = None, order: Iterable[int] | None = None) -> Iterator[Block]:
        """Blocks of the model, loaded, one after another; see `model/walk.py`."""
        return walk(self.model, self.progress, stage, streams, order)

    def embed(self, name: str, batches: list[Tensor] | None = None) -> Stream:
        """A stream for batches [batch, time], the calibration's by default, that starts over when it is interrupted."""
        return self._embed(self.model, self.scratch.hidden(name), batches)

    def again(self, name: str, stream: Stream) -> Stream:
        """What `embed` would give for the same batches once more, of a stream that has not moved."""
        hidden = self.scratch.hidden(name)
        for own in stream.hidden:
            hidden.append(own)
        self.ranks.note("windows", sum(map(len, stream.tokens)))
        return Stream(stream.tokens, hidden, stream.calls, stream.deal)

    def _embed(self, model: StreamedModel, hidden: HiddenStates, batches: list[Tensor] | None = None) -> Stream:
        stream = embed(model, self.batches if batches is None else batches, hidden, self.ranks)
        self.ranks.note("windows", sum(map(len, stream.tokens)))
        return stream

    def apart(
        self, stage: str, indices: Iterable[int], ready: Callable[[int], Known] = nothing
    ) -> Iterator[tuple[list[int], Block | None, Known]]:
        """Blocks that do not depend on one another, as many at a time as there are ranks: which ones, this rank's with
        its weights loaded (None where it has none), and what `ready` says of it, which all ranks ask of each."""
        numbers, size, rank = list(indices), self.ranks.size, self.ranks.rank
        own = self.walk(stage, order=numbers[rank::size])
        for start in range(0, len(numbers), size):
            some = numbers[start : start + size]
            known: Known = {}
            for place, index in enumerate(some):
                found = ready(index)
                known = found if place == rank else known
                del found
            block = next(own, None)
            if block is not None:
                self.ranks.note("blocks")
            yield some, block, known
            del known, block
        left = next(own, None)  # lets go of the last one
        assert left is None

    def unwritten(self, indices: Iterable[int], place: Callable[[int], str]) -> list[int]:
        """Those blocks that no earlier process wrote, by number. place: the path that each has in the result."""
        return [index for index in indices if not self.result.written(place(index))]

    def hand_in(self, places: Sequence[str], own: Iterable[tuple[str, Tensor]]) -> None:
        """Write a block of each rank, as `apart` gives them. places: their paths in the result. own: this rank's
        tensors, by name within the block, linears' as [out, in]."""
        ranks = self.ranks
        mine = own if ranks.size == 1 else list(own)  # computed by each at once, before any is written
        for owner, place in enumerate(places):
            arriving = self._arriving(owner, iter(mine) if owner == ranks.rank else iter(()))
            self.result.put(self.model, place, ((f"{place}.{name}", tensor) for name, tensor in arriving))

    def _arriving(self, owner: int, own: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        while True:
            name, tensor = next(own, (None, None))
            name = self.ranks.agreed(name, owner)
            if name is None:
                return
            yield name, self.ranks.once(tensor, owner)

    def streams(self, name: str, models: Mapping[str, StreamedModel], whole: int | None = None) -> Streams:
        """Streams for the calibration's batches through models, by label, at the first block or where an earlier
        process left off, unless that is beyond the `whole` leading blocks whose results are known to be intact."""
        record = self.journal.last(f"streams {name}")
        how = self.journal, self.result.settle, self.scratch.means.saver
        if record is not None and (whole is None or record["block"] < whole):
            hidden = {label: self.scratch.resumable(f"{name}-{label}") for label in models}
            started = {label: self._embed(model, Forgotten()) for label, model in models.items()}
            found = Streams(name, started, *how)
            if found.load(record, {label: (hidden[label], model.dtype) for label, model in models.items()}):
                for label, stream in started.items():
                    stream.hidden = hidden[label]
                return found
        begun = {
            label: self._embed(model, self.scratch.resumable(f"{name}-{label}")) for label, model in models.items()
        }
        return Streams(name, begun, *how)
