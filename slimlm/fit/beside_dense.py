"""A compressed model fitted block by block beside the dense one: their streams over the same windows.

x is the dense residual stream, x' the compressed one, S the basis, n(.) the norm. In the order a block computes in,

    readers:  W' = argmin sum ||W' n(x') - W n(x)||^2
    writers:  W' = argmin sum ||x' + W' h' - S^T x_after||^2 / ms(x_after)

The writers' target is where the dense stream is after them, so they also repair the error x' has gathered so far; the
weight by the mean square of the stream is what the next norm does to it. Everything a stage needs are sums over tokens:
activations are computed again, not kept. Nothing here knows what is cut from a block, or set to zero.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.families import Norm
from slimlm.fit.pair import AddOf, Pair
from slimlm.fit.ridge import ridge
from slimlm.linalg.finite import all_finite
from slimlm.linalg.regression import Regression
from slimlm.linalg.ridge import GUESS, Fit
from slimlm.model.block import Block

Target = Callable[[int], Tensor]  # of a batch number: [windows, time, hidden]


@dataclass(frozen=True)
class Writing:
    """A writer whose turn it is, and what is to come near `target`: the dense stream behind it, or what it gives where
    that does not reach the stream as it is."""

    name: str
    target: Target


@dataclass
class BlockPair:
    """A block of the dense model, its weights loaded, and the compressed one beside it.

    tensors: what the compressed one has so far, by name within it; linears' weights as [out, in]. passed: whether the
    dense stream is behind the block.
    """

    pair: Pair
    dense: Block
    small: Block
    tensors: dict[str, Tensor]
    passed: bool = False

    def in_order(self) -> Iterator[Norm | Writing]:
        """What is to be fitted, in the order the block computes in: the readers of a norm together, each writer alone.
        The dense stream goes past the block.

        The stream behind the last writer is the one behind the block, so that one waits until the dense weights are let
        go of.
        """
        stream, family, last = self.pair.streams["dense"], self.dense.family, self._last
        for norm in family.norms:
            yield norm
            for name in norm.writers:
                if name in family.skipped:
                    self._leave(name)
                elif name in family.matched:
                    yield Writing(name, partial(self._given, name))
                elif name != last:
                    yield Writing(name, partial(self._behind, name))
        if not self.passed:
            self.dense.advance(stream)
        self.dense.unload()
        if last is not None and last not in family.skipped:
            yield Writing(last, lambda number: stream.hidden[number])

    def _leave(self, name: str) -> None:
        """What the next norm is to read of the dense stream, behind a writer that is not fitted."""
        if name in self.dense.family.between:
            for number in range(len(self.pair.held)):
                self._behind(name, number)

    def _given(self, name: str, number: int) -> Tensor:
        return self.dense.inputs(self.pair.streams["dense"], number, [f"{name}>"])[f"{name}>"]

    def _behind(self, name: str, number: int) -> Tensor:
        """The dense stream of a batch behind a writer. Where only the block's last is left to come, the block runs to
        its end: nothing else of it is to be seen."""
        between, stream = self.pair.between, self.pair.streams["dense"]
        if self.passed:
            return between[number]
        ends, all_done = self._is_last_but_one(name), number == len(self.pair.held) - 1
        hidden, after = self.dense.before(stream, number, [*self._earlier(name), name], "" if ends else None)
        if name in self.dense.family.between:
            between.replace(number, hidden)
            if all_done:
                between.turn()
        if after is not None:
            stream.hidden.replace(number, after)
            if all_done:
                self.dense.require_finite()
                stream.hidden.turn()
                self.passed = True
        return hidden

    @property
    def _last(self) -> str | None:
        """The writer behind which the stream is as the block leaves it: none where experts write, too, or what it gives
        is not what is added."""
        family = self.dense.family
        ends = family.writers and not family.experts and family.writers[-1] not in family.matched
        return family.writers[-1] if ends else None

    def _is_last_but_one(self, name: str) -> bool:
        """Whether all that the dense block computes behind a writer goes through its last norm to its last writer."""
        family = self.dense.family
        ends = family.writers[-2:] == (name, self._last)
        return ends and family.between.get(name) == family.norms[-1].name

    def _earlier(self, name: str) -> list[str]:
        """Writers that add to the stream before another does."""
        return list(takewhile(lambda other: other != name, self.dense.family.writers))

    def _until(self, name: str) -> list[str]:
        """Those of the parameters that have a say in what a linear gets, or in what a norm ("name>") gives."""
        family = self.dense.family
        if family.parallel:
            return list(self.tensors)
        later = {name}
        for norm in reversed(family.norms):
            if name in (*norm.readers, *norm.writers):
                break
            later |= {*norm.readers, *norm.writers, *([family.experts.module] if family.experts else ())}
            if name == f"{norm.name}>":
                break
        return [key for key in self.tensors if key.rpartition(".")[0] not in later]

    @contextmanager
    def _running(self, name: str) -> Iterator[None]:
        """The compressed block with its tensors, as far as `name` needs them. They are in the dtype it computes in
        meanwhile, where that holds them exactly, so that they are not in memory twice."""
        dtype, needed, tensors = self.pair.small.dtype, self._until(name), self.tensors
        exact = {key: tensors[key].dtype for key in needed if torch.promote_types(tensors[key].dtype, dtype) == dtype}
        for key in exact:
            tensors[key] = tensors[key].to(dtype)
        try:
            with self.small.placed({key: tensors[key] for key in needed}):
                yield
        finally:
            for key, stored in exact.items():
                tensors[key] = tensors[key].to(stored)

    def reader_data(self, norm: Norm) -> Regression:
        """What readers of a norm see in the compressed block, and saw in the dense one."""
        hidden, width = self.pair.basis.shape
        shown = f"{norm.name}>" if norm.name else norm.readers[0]
        is_between = norm.name in self.dense.family.between.values()

        def show(add_of: AddOf) -> None:
            with self._running(shown):
                for number, (held, seen) in enumerate(self.pair.held_and_seen):
                    if is_between:
                        dense = self.dense.module.get_submodule(norm.name)(self.pair.between[number])
                    else:
                        dense = self.dense.inputs(self.pair.streams["dense"], number, [shown])[shown]
                    small = self.small.inputs(self.pair.streams["small"], number, [shown])
                    add_of(number)(small[shown][seen], dense[seen], held[seen], None)

        return self.pair.regression(width, hidden, show)

    def writer_data(self, writing: Writing) -> Regression:
        """What a writer gets in the compressed block, and what it has to give."""
        small, stream, name = self.pair.small, self.pair.streams["small"], writing.name
        matched, tensors = name in self.dense.family.matched, self.tensors

        def show(add_of: AddOf) -> None:
            with self._running(name):
                for number, (held, seen) in enumerate(self.pair.held_and_seen):
                    before, x = self.small.before(stream, number, [] if matched else self._earlier(name), name)
                    assert x is not None
                    wanted, weight = self.pair.wanted(writing.target(number).float())
                    if not matched:
                        before = before.float()
                        if small.family.centred:  # norms do not see its mean, and a tied table has one
                            before = before - before.mean(-1, keepdim=True)
                        wanted = (wanted - before) / small.residual_scale
                    if f"{name}.bias" in tensors:
                        wanted = wanted - tensors[f"{name}.bias"].to(wanted)
                    add_of(number)(x[seen], wanted[seen], held[seen], weight[seen])

        return self.pair.regression(tensors[f"{name}.weight"].shape[1], self.pair.basis.shape[1], show)

    def fit(self, name: str, data: Regression, prior: Tensor, metric: Tensor | None = None) -> Fit:
        """The ridge regression of a linear or norm, its strength searched from that of the block before, and recorded.

        prior: [out, in]; metric: [out, out], as in `ridge`. Uses `data` up.
        """
        figures = self.pair.streams.figures
        before = figures.get(f"{self.small.index - 1}.{name}", math.inf)
        fit = ridge(data, prior, metric, before if math.isfinite(before) else GUESS, self.pair.deal.ranks)
        figures[f"{self.small.index}.{name}"] = fit.strength
        return fit

    def store(self, name: str, tensor: Tensor) -> None:
        """Set a parameter, linears' as [out, in], in the dtype it is written in: what follows makes up for rounding.

        Raises RunFailure for one that is not finite in it."""
        full = f"{self.small.path}.{name}"
        stored = tensor.to(self.pair.small.stored_dtype(full, self.pair.dtype))
        if not all_finite(stored):
            raise RunFailure(f"tensor {full} is not finite in {stored.dtype}: write another --dtype")
        self.tensors[name] = stored
