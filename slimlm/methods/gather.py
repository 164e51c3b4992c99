"""Reordering the neurons of a block's MLP, so that what is kept of its matrices gathers in whole tiles.

Neurons may stand in any order: rows of what makes them and columns of what reads them move together, and the block
computes the same. Most energy first, as a pivoted factorisation takes its columns, puts neurons that keep little beside
one another. Sharing tiles out among neurons by what each has in them gains next to nothing on top of that.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from slimlm.methods.inputs import input_statistics
from slimlm.methods.widths import Layout
from slimlm.stream import Stream


def gathered(layout: Layout, index: int, stream: Stream | None = None) -> dict[str, Tensor]:
    """What reordering changes in block `index`, its weights loaded: parameters by name within it, linears' [out, in].

    stream: before the block, to weigh weights by the norms of their inputs. Nothing changes in a family whose neurons
    are not declared, or where one of the linears is to stay as it is.
    """
    model, axis = layout.model, layout.axes.get("mlp")
    if axis is None or model.family.experts:
        return {}
    weights, first = model.weights(index), model.anatomy[index].first_of
    linears = (*axis.rows, *axis.columns)
    if model.anatomy[index].spared & {*linears}:
        return {}
    seen = {first[name] for name in linears}
    norms = input_statistics(model, index, stream, sorted(seen), norms=True).statistics if stream else {}
    of_rows = {name: _energies(weights, name, norms.get(first[name])).sum(1) for name in axis.rows}
    of_columns = {name: _energies(weights, name, norms.get(first[name])).sum(0) for name in axis.columns}
    neurons = layout.dense.mlp
    total = sum(energy.view(-1, neurons).sum(0) for energy in (*of_rows.values(), *of_columns.values()))
    assert isinstance(total, Tensor)
    order = total.argsort(descending=True, stable=True)
    moved = {f"{name}.weight": weights[f"{name}.weight"][:, order] for name in axis.columns}
    for name in (f"{linear}.{kind}" for linear in axis.rows for kind in ("weight", "bias")):
        if name in weights:
            moved[name] = weights[name].unflatten(0, (-1, neurons))[:, order].flatten(0, 1)
    return moved


def _energies(weights: Mapping[str, Tensor], name: str, norms: Tensor | None) -> Tensor:
    """Squares of a linear's weights times its inputs' norms, of mean 1: [out, in]."""
    weight = weights[f"{name}.weight"].float()
    energy = (weight if norms is None else weight * norms).square()
    return energy / energy.mean().clamp_min(torch.finfo(energy.dtype).tiny)
