"""Second moments of what a block's linears get: Gram matrices, or the squares on their diagonal."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from slimlm.deal import Parts
from slimlm.errors import RunFailure
from slimlm.linalg.gram import Gram, gram_bytes, is_wide
from slimlm.model.block import Block, Group
from slimlm.model.stream import Stream

GRAM_BYTES = 1 << 30  # of experts' Grams, held at once; another pass of the block for as many more
FEW = 0.25  # tokens an expert must have seen for each of a matrix's inputs, else its statistics say too little


S = TypeVar("S", bound=Gram)


def input_sums(
    block: Block,
    stream: Stream,
    names: Sequence[str],
    kind: Callable[[int, torch.device], S],
    onward: bool = False,
    owners: Sequence[int] | None = None,
) -> dict[str, S]:
    """Over the inputs of the named linears of a block, its weights loaded. One that no token reaches is left out.

    kind: `Gram` or `Squares`. onward: whether the stream goes past the block, or stays before it. owners: the rank that
    gets each; everybody gets all by default. Raises RunFailure on NaN.
    """
    widths = [block.matrix(name).shape[1] for name in names]
    parts = {
        name: Parts(stream.deal, partial(kind, width, block.model.device), whole=is_wide(width))
        for name, width in zip(names, widths, strict=True)
    }

    def see(name: str, x: Tensor, _: Tensor) -> None:
        parts[name].at(stream.number).add(x.flatten(0, -2).float())

    with block.watched(names, see):
        (block.advance if onward else block.observe)(stream)
    totals = {
        name: parts.pop(name).shared() if owners is None else parts.pop(name).total(owners[place])
        for place, name in enumerate(names)
    }
    found = {name: total for name, total in totals.items() if total is not None}
    for name, total in found.items():
        if not torch.isfinite(total.diagonal()).all():
            raise RunFailure(f"inputs of {block.path}.{name} hold NaN or Inf")
    return found


def firsts(groups: Sequence[Group]) -> list[str]:
    """Of the linears of each input the one that is looked at."""
    return [group.first for group in groups]


def in_turn(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups in parts whose Grams fit into memory together: all but experts' at once, and these some at a time."""
    few: list[Group] = []
    size = 0
    for group in groups:
        added = gram_bytes(group.inputs) if group.is_expert else 0
        if few and added and size + added > GRAM_BYTES:
            yield few
            few, size = [], 0
        few.append(group)
        size += added
    if few:
        yield few
