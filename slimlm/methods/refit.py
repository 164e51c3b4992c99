"""Refit of a sliced model, block by block: the dense and the compressed stream side by side.

x is the dense residual stream, x' the compressed one, S the basis, n(.) the norm. In the order a block computes in,

    readers:  W' = argmin sum ||W' n(x') - W n(x)||^2
    writers:  W' = argmin sum ||x' + W' h' - S^T x_after||^2 / ms(x_after)

each by ridge regression towards the rotated weight (`linalg/ridge.py`). The writers' target is where the dense stream
is after them, so they also repair the error x' has gathered so far; the weight by the mean square of the stream is what
the next norm does to it. Units of narrower axes are deleted when their turn comes, by structured OBS on the compressed
model's own activations. Everything a stage needs are sums over tokens: activations are computed again, not kept.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile

import torch
from torch import Tensor

from slimlm.activations import HiddenStates
from slimlm.checkpoint.reader import Checkpoint
from slimlm.errors import RunFailure
from slimlm.families import Axis, Norm, family_of
from slimlm.linalg.ridge import GUESS, Add, Regression, held_out, ridge
from slimlm.methods.narrow import narrow_experts, narrow_rows, without_units
from slimlm.methods.plan import Plan
from slimlm.methods.rotation import is_own, norm_of, seen_through, slice_block
from slimlm.methods.widths import Layout, Widths
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work, as_figures, as_state

Tensors = dict[str, Tensor]  # parameters of a block, by name within it
Begin = Callable[[Tensors], Tensors]
FitReaders = Callable[[Norm, Tensors], None]
FitWriter = Callable[[str, Callable[[int], Tensor], Tensors], None]


@dataclass
class Pair:
    """The dense model and the compressed one, their streams over the same windows. basis: [hidden, width], fp32.

    between: for the dense stream behind a writer, which the next norm in the block reads.
    """

    layout: Layout
    widths: Widths
    small: StreamedModel
    basis: Tensor
    streams: dict[str, Stream]
    between: HiddenStates
    dtype: str = "auto"  # to write in; as the compressed model has its weights
    fits: dict[str, float] = field(default_factory=dict)  # strength of the ridge, by linear or norm

    @property
    def dense(self) -> StreamedModel:
        return self.layout.model

    @cached_property
    def held(self) -> list[Tensor]:
        """Per batch, which of its windows are held out: [windows] bool."""
        tokens = self.streams["dense"].tokens
        counts = [len(batch) for batch in tokens]
        return list(held_out(sum(counts)).to(self.dense.device).split(counts))

    def guess(self, place: int, name: str) -> float:
        """The strength that a linear or norm had in the block before, to search from."""
        before = self.fits.get(f"{place - 1}.{name}", math.inf)
        return before if math.isfinite(before) else GUESS

    def through_block(self, block: int, begin: Begin, readers: FitReaders, writer: FitWriter) -> Tensors:
        """Fit a block's linears in the order it computes in: its parameters. The dense stream goes past it.

        begin: makes the parameters to start from, of the dense ones. writer: gets, by batch number, what
        [windows, time, hidden] is to come near: the dense stream behind the writer, or what the writer gives where that
        does not reach the stream as it is. The stream behind the last writer is the one behind the block, so that one
        can wait until the dense block is let go of.
        """
        model, stream, anatomy = self.dense, self.streams["dense"], self.dense.anatomy[block]
        ends = anatomy.writers and not anatomy.experts and anatomy.writers[-1] not in anatomy.matched
        last = anatomy.writers[-1] if ends else None  # experts write after it, or what it gives is not what is added
        with model.block(block):
            tensors = begin(model.weights(block))
            for norm in anatomy.norms:
                readers(norm, tensors)
                for name in norm.writers:
                    if name in anatomy.skipped:
                        self._leave(block, name)
                    elif name in anatomy.matched:
                        writer(name, partial(self._given, block, name), tensors)
                    elif name != last:
                        writer(name, partial(self._behind, block, name), tensors)
            model.advance(block, stream)
        if last is not None and last not in anatomy.skipped:
            writer(last, lambda number: stream.hidden[number], tensors)
        return tensors

    def _leave(self, block: int, name: str) -> None:
        """What the next norm is to read of the dense stream, behind a writer that is not fitted."""
        if name in self.dense.anatomy[block].between:
            for number in range(len(self.held)):
                self._behind(block, name, number)

    def _given(self, block: int, name: str, number: int) -> Tensor:
        return self.dense.inputs(block, self.streams["dense"], number, [f"{name}>"])[f"{name}>"]

    def _behind(self, block: int, name: str, number: int) -> Tensor:
        hidden = self.dense.before(block, self.streams["dense"], number, [*self._earlier(block, name), name])[0]
        if name in self.dense.anatomy[block].between:
            self.between.replace(number, hidden)
            if number == len(self.held) - 1:
                self.between.turn()
        return hidden

    def _earlier(self, block: int, name: str) -> list[str]:
        """Writers of a dense block that add to the stream before another does."""
        anatomy = self.dense.anatomy[block]
        return list(takewhile(lambda other: other != name, anatomy.writers))

    def _until(self, block: int, name: str, tensors: Tensors) -> list[str]:
        """Those of a block's parameters that have a say in what a linear gets, or in what a norm ("name>") gives."""
        anatomy = self.dense.anatomy[block]
        if anatomy.parallel:
            return list(tensors)
        later = {name}
        for norm in reversed(anatomy.norms):
            if name in (*norm.readers, *norm.writers):
                break
            later |= {*norm.readers, *norm.writers, *([anatomy.experts.module] if anatomy.experts else ())}
            if name == f"{norm.name}>":
                break
        return [key for key in tensors if key.rpartition(".")[0] not in later]

    @contextmanager
    def _running(self, block: int, place: int, name: str, tensors: Tensors) -> Iterator[None]:
        """The compressed block with `tensors`, as far as `name` needs them. They are in the dtype it computes in
        meanwhile, where that holds them exactly, so that they are not in memory twice."""
        dtype, needed = self.small.dtype, self._until(block, name, tensors)
        exact = {key: tensors[key].dtype for key in needed if torch.promote_types(tensors[key].dtype, dtype) == dtype}
        for key in exact:
            tensors[key] = tensors[key].to(dtype)
        try:
            with self.small.placed(self.small.family.block(place), {key: tensors[key] for key in needed}):
                yield
        finally:
            for key, stored in exact.items():
                tensors[key] = tensors[key].to(stored)

    def reader_data(self, block: int, place: int, norm: Norm, tensors: Tensors) -> Regression:
        """What readers of a norm see in the compressed block of `tensors`, and saw in the dense one."""
        hidden, width = self.basis.shape
        seen = f"{norm.name}>" if norm.name else norm.readers[0]
        is_between = norm.name in self.dense.anatomy[block].between.values()

        def show(add: Add) -> None:
            with self._running(block, place, seen, tensors):
                for number, held in enumerate(self.held):
                    if is_between:
                        dense = self.dense.blocks[block].get_submodule(norm.name)(self.between[number])
                    else:
                        dense = self.dense.inputs(block, self.streams["dense"], number, [seen])[seen]
                    small = self.small.inputs(place, self.streams["small"], number, [seen])
                    add(small[seen], dense, held, None)

        return self._regression(width, hidden, show)

    def _regression(self, inputs: int, outputs: int, show: Callable[[Add], None]) -> Regression:
        data = Regression.of(inputs, outputs, self.dense.device)
        data.again = show
        show(data.add)
        return data

    def writer_data(
        self, block: int, place: int, name: str, target: Callable[[int], Tensor], tensors: Tensors
    ) -> Regression:
        """What a writer gets in the compressed block of `tensors`, and what it has to give."""
        small, stream, matched = self.small, self.streams["small"], name in self.dense.anatomy[block].matched

        def show(add: Add) -> None:
            with self._running(block, place, name, tensors):
                for number, held in enumerate(self.held):
                    before, x = small.before(place, stream, number, [] if matched else self._earlier(block, name), name)
                    assert x is not None
                    wanted, weight = self._wanted(target(number).float())
                    if not matched:
                        before = before.float()
                        if small.family.centred:  # norms do not see its mean, and a tied table has one
                            before = before - before.mean(-1, keepdim=True)
                        wanted = (wanted - before) / small.residual_scale
                    if f"{name}.bias" in tensors:
                        wanted = wanted - tensors[f"{name}.bias"].to(wanted)
                    add(x, wanted, held, weight)

        return self._regression(tensors[f"{name}.weight"].shape[1], self.basis.shape[1], show)

    def _wanted(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The dense stream [..., hidden] in the basis, and the square of what its next norm multiplies it by: [...]."""
        centred = stream - stream.mean(-1, keepdim=True) if self.small.family.centred else stream
        return self.into(stream), 1 / (centred.square().mean(-1) + self.dense.norm_eps).clamp_min(1e-30)

    @cached_property
    def _stays(self) -> bool:
        return is_own(self.basis)

    def into(self, x: Tensor) -> Tensor:
        """The dense stream x: [..., hidden] in the basis: [..., width]."""
        return x if self._stays else x @ self.basis

    def stored(self, place: int, name: str, tensor: Tensor) -> Tensor:
        """A parameter of a compressed block in the dtype it is written in: what follows makes up for rounding."""
        name = f"{self.small.family.block(place)}.{name}"
        stored = tensor.to(self.small.stored_dtype(name, self.dtype))
        if not torch.isfinite(stored).all():
            raise RunFailure(f"tensor {name} is not finite in {stored.dtype}: write another --dtype")
        return stored


@torch.no_grad()
def refit_blocks(layout: Layout, widths: Widths, plan: Plan, basis: Tensor, batches: list[Tensor], work: Work) -> Pair:
    """Write every block of the compressed model, refitted; the streams end behind the last one."""
    model, blocks = layout.model, layout.dense.blocks
    work.settle()  # the compressed model is read from where it is written
    config = copy.deepcopy(plan.config)  # building a model sets its dtype
    small = StreamedModel(
        Checkpoint(work.output), config, family_of(config), model.device, model.dtype, model.trust_remote_code
    )
    place = {block: index for index, block in enumerate(widths.blocks)}

    def is_whole(block: int) -> bool:
        return block not in place or work.written(model.family.block(place[block]))

    whole = len(list(takewhile(is_whole, blocks)))
    streams, state, first = work.start_streams("refit", {"dense": (model, batches), "small": (small, batches)}, whole)
    pair = Pair(layout, widths, small, basis.to(model.device), streams, work.scratch("between", model.device))
    pair.fits |= as_figures(state)
    work.progress.stage("refitting", len(blocks))
    work.progress.step(first)
    for block in range(first, len(blocks)):
        start = time.perf_counter()
        if block in place:
            work.pass_through(small, place[block], refit_block(pair, block, place[block]), streams["small"])
        else:
            with model.block(block):
                model.advance(block, streams["dense"])
        work.save_streams("refit", block, streams, as_state(pair.fits))
        work.progress.step()
        work.progress.done("refitted", model.family.block(block), time.perf_counter() - start)
    return pair


def refit_block(pair: Pair, block: int, place: int) -> Tensors:
    """The compressed block's parameters as they are stored, by name within the block; the dense stream goes past it."""

    anatomy = pair.dense.anatomy[block]
    fitted = {name for norm in anatomy.norms if norm.readers for name in anatomy.fitting(norm)}  # before anything runs

    def begin(dense: Tensors) -> Tensors:
        others = {name: tensor for name, tensor in dense.items() if name not in fitted}
        sliced = slice_block(others, anatomy, pair.basis, pair.layout.zeros(pair.widths))
        return {name: pair.stored(place, name, tensor) for name, tensor in sliced}

    return pair.through_block(
        block, begin, partial(_fit_readers, pair, block, place), partial(_fit_writer, pair, block, place)
    )


def _fit_readers(pair: Pair, block: int, place: int, norm: Norm, tensors: Tensors) -> None:
    """All readers of a norm see the same, so one map T from what they see now to what they saw serves all: W' = W T."""
    if pair.dense.anatomy[block].fitting(norm):
        _fit_map(pair, block, place, norm, tensors)
    anatomy = pair.dense.anatomy[block]
    if anatomy.experts and norm is anatomy.norms[-1] and pair.widths.mlp < pair.layout.dense.mlp:
        starved = narrow_experts(pair.small, place, pair.streams["small"], anatomy.experts, pair.widths.mlp, tensors)
        pair.fits |= {f"{place}.{name} starved_experts": float(tokens) for name, tokens in starved.items()}
        for parameter in anatomy.experts.parameters:
            tensors[parameter] = pair.stored(place, parameter, tensors[parameter])


def _fit_map(pair: Pair, block: int, place: int, norm: Norm, tensors: Tensors) -> None:
    weights = pair.dense.weights(block)
    data = pair.reader_data(block, place, norm, tensors)
    readers = pair.dense.anatomy[block].fitting(norm)
    metric = torch.zeros(len(pair.basis), len(pair.basis), dtype=torch.float32, device=pair.basis.device)
    for name in readers:
        weight = weights[name].float().flatten(0, -2)
        metric.addmm_(weight.T, weight)
        del weight  # one reader in fp32 at a time
    prior = seen_through(norm_of(weights, norm.name), pair.dense.family, pair.basis)
    fit = ridge(data, prior, metric, pair.guess(place, norm.label))
    del data, metric, prior  # as large together as the readers that are made now
    pair.fits[f"{place}.{norm.label}"] = fit.strength
    for name in readers:
        tensors[name] = pair.stored(place, name, weights[name].float() @ fit.weight)


def _fit_writer(
    pair: Pair, block: int, place: int, writer: str, target: Callable[[int], Tensor], tensors: Tensors
) -> None:
    name = f"{writer}.weight"
    data = pair.writer_data(block, place, writer, target, tensors)
    for axis_name, axis in pair.layout.axes.items():
        if writer in axis.columns and pair.widths.of(axis_name) < pair.layout.dense.of(axis_name):
            data = _narrow(pair, axis_name, axis, name, data, tensors)
    fit = ridge(data, tensors[name], guess=pair.guess(place, writer))
    pair.fits[f"{place}.{writer}"] = fit.strength
    tensors[name] = pair.stored(place, name, fit.weight)


def _narrow(
    pair: Pair, axis_name: str, axis: Axis, name: str, data: Regression, tensors: dict[str, Tensor]
) -> Regression:
    """Delete units of an axis from all its linears; what is left of the data."""
    full, width = pair.layout.dense.of(axis_name), pair.widths.of(axis_name)
    size, linear = tensors[name].shape[1] // full, name.removesuffix(".weight")
    with data.gram() as gram:
        kept, tensors[name] = without_units(gram, tensors[name], size, full - width, linear)
    del gram
    narrow_rows(pair.layout, axis, kept, tensors)
    return data.take(kept.repeat_interleave(size).nonzero().flatten())
