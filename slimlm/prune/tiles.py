"""Reordering the neurons of a block's MLP, so that what is kept of its matrices gathers in whole tiles.

Neurons may stand in any order: rows of what makes them and columns of what reads them move together, and the block
computes the same. Most energy first, as a pivoted factorisation takes its columns, puts neurons that keep little beside
one another. Sharing tiles out among neurons by what each has in them gains next to nothing on top of that.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from slimlm.linalg.gram import Squares
from slimlm.model.block import Block
from slimlm.model.stream import Stream
from slimlm.statistics.grams import input_sums


def gathered(block: Block, stream: Stream | None = None) -> dict[str, Tensor]:
    """What reordering changes in a block, its weights loaded: parameters by name within it, linears' [out, in].

    stream: before the block, to weigh weights by the norms of their inputs. Nothing changes in a family whose neurons
    are not declared, or where one of the linears is to stay as it is.
    """
    family, axis = block.family, block.family.mlp
    if axis is None or block.model.family.experts:
        return {}
    weights, first = block.weights(), family.first_of
    linears = (*axis.rows, *axis.columns)
    if family.spared & {*linears}:
        return {}
    seen = sorted({first[name] for name in linears})
    norms = {name: sums.norms() for name, sums in input_sums(block, stream, seen, Squares).items()} if stream else {}
    energies = [
        _energies(weights, name, norms.get(first[name])).sum(summed)
        for names, summed in ((axis.rows, 1), (axis.columns, 0))
        for name in names
    ]
    neurons = block.matrix(axis.columns[0]).shape[1]
    total = sum(energy.view(-1, neurons).sum(0) for energy in energies)
    assert isinstance(total, Tensor)
    order = total.argsort(descending=True, stable=True)
    moved = {f"{name}.weight": weights[f"{name}.weight"][:, order] for name in axis.columns}
    for name in (f"{linear}.{kind}" for linear in axis.rows for kind in ("weight", "bias")):
        if name in weights:
            moved[name] = weights[name].unflatten(0, (-1, neurons))[:, order].flatten(0, 1)
    return moved


def reorder(block: Block, stream: Stream | None = None) -> None:
    """Put the neurons of a block, its weights loaded, in that order. stream: as in `gathered`."""
    weights = block.weights()
    for name, tensor in gathered(block, stream).items():
        weights[name].copy_(tensor)


def _energies(weights: Mapping[str, Tensor], name: str, norms: Tensor | None) -> Tensor:
    """Squares of a linear's weights times its inputs' norms, of mean 1: [out, in]."""
    weight = weights[f"{name}.weight"].float()
    energy = (weight if norms is None else weight * norms).square()
    return energy / energy.mean().clamp_min(torch.finfo(energy.dtype).tiny)
