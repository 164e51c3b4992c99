"""The residual stream of a set of windows on its way through a model, and hooks to see it by."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimlm.deal import Deal
from slimlm.model.hidden import HiddenStates, InMemory
from slimlm.ranks import ALONE


class Stop(Exception):
    """Ends a forward that has shown all that was to be seen."""


@dataclass(frozen=True)
class BlockCall:
    """What one block gets besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, windows: Tensor, count: int, time: int) -> "BlockCall":
        """The same for some of a batch's windows only: [some]. count, time: windows and tokens of the whole batch."""

        def chosen(tensor: Tensor) -> Tensor:
            is_batch = tensor.dim() >= 2 and len(tensor) == count > 1
            return tensor[windows] if is_batch and (tensor.dim() > 2 or tensor.shape[1] == time) else tensor

        found = [
            type(value)(BlockCall(tuple(value), {}).of(windows, count, time).args)
            if isinstance(value, (tuple, list))
            else chosen(value)
            if isinstance(value, Tensor)
            else value
            for value in (*self.args, *self.kwargs.values())
        ]
        own = len(self.args)
        return BlockCall(tuple(found[:own]), dict(zip(self.kwargs, found[own:], strict=True)))


@dataclass
class Stream:
    """The residual stream of a set of windows, on its way through the blocks.

    tokens: per batch, [batch, time]. hidden: per batch, [batch, time, hidden], entering the next block.
    calls: per batch, per block; batches whose arguments are equal share one object. dealt: which of all batches these
    are; None where they are all. number: of the batch that is under way in a block.
    """

    tokens: list[Tensor]
    hidden: HiddenStates = field(default_factory=InMemory)
    calls: list[list[BlockCall]] = field(default_factory=list)
    dealt: Deal | None = None
    number: int = 0

    @property
    def deal(self) -> Deal:
        """Which of all ranks' batches are here."""
        return self.dealt or Deal(ALONE, len(self.tokens))

    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """Numbers and hidden states [batch, time, hidden] of this rank's batches, one under way after another."""
        for number, hidden in enumerate(self.hidden):
            self.number = number
            yield number, hidden


def owner_of(module: nn.Module, name: str) -> nn.Module:
    """The submodule a parameter, by its name within `module`, belongs to."""
    return module.get_submodule(name.rpartition(".")[0])


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor`, of any shape [...], the module's parameter of that name."""
    set_parameter(owner_of(module, name), name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))


def set_parameter(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
    """The same of a module's own parameter."""
    owner._parameters[leaf] = parameter
    if isinstance(owner, Conv1D):  # it computes the shape of its output from what it was built with
        owner.nf = owner.weight.shape[1]


def reuse(calls: list[BlockCall], earlier: list[list[BlockCall]]) -> list[BlockCall]:
    """What each block is called with for a batch: equal calls recorded before, where there are, so that arguments do
    not pile up with the number of batches."""
    same = _Same()
    return [
        next((old[index] for old in reversed(earlier[-2:]) if same.calls(call, old[index])), call)
        for index, call in enumerate(calls)
    ]


class _Same:
    """Compares what blocks are called with. Most tensors go to every block, and comparing two waits for a GPU: each
    pair is looked at once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bool] = {}  # by identity; the calls hold on to the tensors meanwhile

    def calls(self, a: BlockCall, b: BlockCall) -> bool:
        """Whether two calls are."""
        return self._equal(a.args, b.args) and self._equal(a.kwargs, b.kwargs)

    def _equal(self, a: object, b: object) -> bool:
        if a is b:
            return True
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            pair = id(a), id(b)
            if pair not in self._known:
                self._known[pair] = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            return self._known[pair]
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(self._equal(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self._equal(a[key], b[key]) for key in a)
        return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
