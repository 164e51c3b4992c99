"""Deleting units of a block's inner widths, what is left making up for them by structured OBS (`linalg/units.py`)."""

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.families import Axis, Experts
from slimlm.linalg.units import removals
from slimlm.methods.inputs import input_statistics
from slimlm.methods.prune_block import FEW, in_turn
from slimlm.methods.widths import Layout
from slimlm.stream import Stream
from slimlm.walk import StreamedModel


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
    model: StreamedModel, index: int, stream: Stream, experts: Experts, width: int, tensors: dict[str, Tensor]
) -> dict[str, int]:
    """Delete each expert's own neurons but `width`, on the tokens that a block of these parameters routes to it.

    One that saw too few loses those that weigh least: how many it saw, by name.
    """
    reads, writes = experts.parameters
    full, starved = tensors[writes].shape[2], dict[str, int]()
    reading, writing = list[Tensor](), list[Tensor]()
    with model.placed(model.family.block(index), tensors):
        for few in in_turn(model, index, [(name,) for name in experts.writing]):
            names = [name for (name,) in few]
            seen = input_statistics(model, index, stream, names)
            for name in names:
                expert, tokens = len(writing), seen.tokens.get(name, 0)
                if tokens < FEW * full:
                    starved[name] = tokens
                    seen.statistics[name] = torch.eye(full, dtype=torch.float32, device=model.device)
                kept, weight = without_units(
                    seen.statistics.pop(name),
                    tensors[writes][expert],
                    1,
                    full - width,
                    f"{model.family.block(index)}.{name}",
                )
                reading.append(tensors[reads][expert].unflatten(0, (-1, full))[:, kept].flatten(0, 1))
                writing.append(weight.to(tensors[writes].dtype))
    tensors[reads], tensors[writes] = torch.stack(reading), torch.stack(writing)
    return starved
