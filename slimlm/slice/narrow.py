"""Deleting units of a block's inner widths, what is left making up for them by structured OBS (`linalg/units.py`)."""

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.families import Axis, Experts
from slimlm.linalg.gram import Gram
from slimlm.linalg.units import removals
from slimlm.model.block import Block, Group
from slimlm.model.stream import Stream
from slimlm.slice.widths import Layout
from slimlm.statistics.grams import FEW, firsts, in_turn, input_sums


def without_units(gram: Tensor, weight: Tensor, size: int, count: int, name: str) -> tuple[Tensor, Tensor]:
    """Which units of a linear stay: [units] bool, and its weight [out, what is left of in]. The gram is used up.

    Raises RunFailure with the linear's name when no damping makes the gram positive definite.
    """
    kept = torch.ones(weight.shape[1] // size, dtype=torch.bool, device=gram.device)
    deleting = removals(gram, weight, size, [count])
    del gram  # no longer than the deleting takes: it may be the largest thing there is
    try:
        gone, weight = next(deleting)
        del deleting
    except ValueError as error:
        raise RunFailure(f"inputs of {name} cannot be pruned: {error}") from error
    kept[gone] = False
    return kept, weight[:, kept.repeat_interleave(size)]


def narrow_rows(layout: Layout, axis: Axis, kept: Tensor, tensors: dict[str, Tensor]) -> None:
    """Delete units from the linears of which they are rows. kept: [units] bool."""
    for name in (f"{linear}.{kind}" for linear in axis.rows for kind in ("weight", "bias")):
        if name in tensors:
            stacks = layout.stacks(axis, name.rpartition(".")[0], tensors[name])
            rows = torch.cat([kept.repeat_interleave(length // len(kept)) for length in stacks])
            tensors[name] = tensors[name][rows]


def narrow_experts(
    block: Block, stream: Stream, experts: Experts, width: int, tensors: dict[str, Tensor]
) -> dict[str, int]:
    """Delete each expert's own neurons but `width`, on the tokens that a block of these parameters, experts' packed as
    [experts, out, in], routes to it.

    One that saw too few loses those that weigh least: how many it saw, by name.
    """
    (reads, writes), ranks = experts.parameters, stream.deal.ranks
    starved, first = dict[str, int](), 0
    reading, writing = list[Tensor](), list[Tensor]()
    with block.placed(tensors):
        for few in in_turn([block.group(name) for name in experts.writing]):
            owners = ranks.owners([group.cost for group in few])
            grams = input_sums(block, stream, firsts(few), Gram, owners=owners)
            own = {
                expert: _narrowed(group, grams.pop(group.first, None), tensors[writes][expert], width, starved)
                for expert, group in enumerate(few, first)
                if owners[expert - first] == ranks.rank
            }
            for expert, owner in enumerate(owners, first):
                kept, weight = (ranks.once(own[expert][side] if expert in own else None, owner) for side in range(2))
                reading.append(tensors[reads][expert].unflatten(0, (-1, len(kept)))[:, kept].flatten(0, 1))
                writing.append(weight)
            first += len(few)
    tensors[reads], tensors[writes] = torch.stack(reading), torch.stack(writing)
    return ranks.merged(starved)


def _narrowed(
    group: Group, gram: Gram | None, weight: Tensor, width: int, starved: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Which neurons of an expert stay, [neurons] bool, and its writing weight [out, width]; see `narrow_experts`."""
    full, tokens = weight.shape[1], gram.tokens if gram else 0
    if gram is None or tokens < FEW * full:
        starved[group.first] = tokens
        gram = None
    second = gram.take() if gram else torch.eye(full, dtype=torch.float32, device=weight.device)
    kept, left = without_units(second, weight, 1, full - width, group.full_names[0])
    return kept, left.to(weight.dtype)
