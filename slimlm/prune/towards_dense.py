"""Pruning towards what the dense model computes: dense and pruned streams side by side.

With x the dense stream's input of a linear, x' the pruned one's, the kept weights of readers minimise
`||V x' - W x||^2`, those of writers `||s' + V x' - s_after||^2 / ms(s_after)`, s' and s_after being the pruned residual
stream before the writer and the dense one behind it: what went wrong before is made up for. Both are quadratic in V:
the dense weight gives way to the ridge regression's (`linalg/ridge.py`), the curvature is that of x' with the ridge on
its diagonal, and the mask is chosen and refined for that problem.
"""

import math

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.families import Norm
from slimlm.fit.beside_dense import BlockPair, Writing
from slimlm.linalg.hessian import DAMPING, quadratic_loss
from slimlm.linalg.regression import Regression, Rows
from slimlm.linalg.ridge import Fit
from slimlm.linalg.softmax import RATE
from slimlm.model.block import Group
from slimlm.prune.curvature import damped
from slimlm.prune.group import Gradients, Row, curvatures, prune, prune_group
from slimlm.prune.quota import Quotas

HEAD_RATE = 0.3 * RATE  # pruned streams are nearer to the dense one than sliced ones


def prune_block(block: BlockPair, gradients: Gradients, quotas: Quotas, row: Row) -> None:
    """Leave the block's parameters as they are to be stored in its `tensors`; the dense stream goes past it."""
    for step in block.in_order():
        match step:
            case Norm():
                _prune_readers(block, step, gradients, quotas, row)
            case Writing():
                _prune_writer(block, step, gradients, quotas, row)


def _prune_writer(block: BlockPair, writing: Writing, gradients: Gradients, quotas: Quotas, row: Row) -> None:
    data = block.writer_data(writing)
    fit = block.fit(writing.name, data, block.tensors[f"{writing.name}.weight"])
    _prune_together(block, (writing.name,), (fit, data), gradients, quotas, row)


def _prune_readers(block: BlockPair, norm: Norm, gradients: Gradients, quotas: Quotas, row: Row) -> None:
    """One map from what the readers see now to what they saw serves all: their target is W T."""
    family, tensors = block.dense.family, block.tensors
    names = tuple(name for name in norm.readers if name not in family.spared)
    if names:
        data = block.reader_data(norm)
        weights = torch.cat([tensors[f"{name}.weight"].float() for name in names])
        prior = torch.eye(weights.shape[1], dtype=torch.float32, device=weights.device)
        fit = block.fit(norm.label, data, prior, weights.T @ weights)
        target = Fit(weights @ fit.weight, fit.strength)
        _prune_together(block, names, (target, data), gradients, quotas, row)
    if family.experts and norm is family.norms[-1]:
        _prune_experts(block, gradients, quotas, row)


def _prune_experts(block: BlockPair, gradients: Gradients, quotas: Quotas, row: Row) -> None:
    """Each expert on the tokens that the pruned model routes to it. These need not be those it had in the dense model,
    so it aims at what it computed itself."""
    family, streams, tensors = block.dense.family, block.pair.streams, block.tensors
    assert family.experts is not None
    for parameter in family.experts.parameters:
        tensors[parameter] = tensors[parameter].to(block.pair.small.dtype, copy=True)  # the dense block is still to run
    with block.small.placed(tensors):
        groups = [block.small.group(name) for name in family.experts.matrices if name not in family.spared]
        for group, curvature, own in curvatures(block.small, streams["small"], groups, row, gradients, streams.figures):
            prune_group(group, curvature, quotas, own)
            del curvature  # before there is the next one


def _prune_together(
    block: BlockPair,
    names: tuple[str, ...],
    aim: tuple[Fit, Regression],
    gradients: Gradients,
    quotas: Quotas,
    row: Row,
) -> None:
    """Prune linears that read the same input. aim: what their kept weights [out, in] are to come near, and the data."""
    (target, data), ranks = aim, block.pair.deal.ranks
    group = block.dense.group(*names)
    if ranks.first or isinstance(data.held, Rows):
        data.join()
    own = _pruned(block, group, (target, data.fit.xx), gradients, quotas, row) if ranks.first else None
    found = ranks.once(own)
    for name, rows in zip(names, found.split(quotas[group].rows), strict=True):
        block.store(f"{name}.weight", rows)


def _pruned(
    block: BlockPair, group: Group, aim: tuple[Fit, Tensor], gradients: Gradients, quotas: Quotas, row: Row
) -> Tensor:
    """What becomes of a group's stacked weights: [sum of outs, in]. aim: what they are to come near, and the inputs'
    Gram [in, in], used up."""
    (target, gram), full = aim, group.full_names[0]
    if not torch.isfinite(gram.diagonal()).all():
        raise RunFailure(f"inputs of {full} hold NaN or Inf")
    block.pair.deal.ranks.note("solves")
    strength = max(DAMPING, target.strength) if math.isfinite(target.strength) else DAMPING
    curvature = damped(gram, full, strength, [gradients[name] for name in group.names if name in gradients])
    wanted = target.weight.to(gram.dtype)
    found, _ = prune(wanted, curvature, quotas[group], row)
    figures, label = block.pair.streams.figures, f"{block.small.index}.{group.first}"
    figures[f"{label} damping"] = curvature.damping
    lost = quadratic_loss(found - wanted, curvature).sum() / quadratic_loss(wanted, curvature).sum()
    figures[f"{label} predicted_error"] = float(lost)
    return found
