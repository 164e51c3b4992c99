"""Pruning towards what the dense model computes: dense and pruned streams side by side.

With x the dense stream's input of a linear, x' the pruned one's, the kept weights of readers minimise
`||V x' - W x||^2`, those of writers `||s' + V x' - s_after||^2 / ms(s_after)`, s' and s_after being the pruned residual
stream before the writer and the dense one behind it: what went wrong before is made up for. Both are quadratic in V:
the dense weight gives way to the ridge regression's (`linalg/ridge.py`), the curvature is that of x' with the ridge on
its diagonal, and the mask is chosen and refined for that problem. The head, which is not pruned, is refitted last, as
in slicing.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.families import Experts, Norm
from slimlm.linalg.hessian import DAMPING, quadratic_loss
from slimlm.linalg.ridge import Fit, Regression, ridge
from slimlm.linalg.softmax import RATE
from slimlm.methods.fisher import TokenGradients
from slimlm.methods.gather import gathered
from slimlm.methods.head import fits_head, head_notes, refit_head
from slimlm.methods.matrix import Task, curvature_of, prune_tall
from slimlm.methods.prune_block import by_kind, prune_seen
from slimlm.methods.refit import Pair, Tensors
from slimlm.methods.rotation import write_head
from slimlm.methods.widths import Layout
from slimlm.recipe import PruneStep
from slimlm.walk import StreamedModel
from slimlm.work import Work, as_figures, as_state

HEAD_RATE = 0.3 * RATE  # pruned streams are nearer to the dense one than sliced ones


@torch.no_grad()
def prune_and_repair(
    model: StreamedModel, recipe: PruneStep, task: Task, batches: list[Tensor], work: Work
) -> dict[str, Any]:
    """Write every block pruned, and the head refitted unless it is tied to the embedding; figures for the manifest."""
    layout = Layout(model)
    eye = torch.eye(model.config.hidden_size, dtype=torch.float32, device=model.device)
    small = StreamedModel(
        model.checkpoint,
        copy.deepcopy(model.config),
        model.family,
        model.device,
        model.dtype,
        model.trust_remote_code,
    )
    work.progress.stage("pruning", len(model.blocks))
    starts = {"dense": (model, batches), "small": (small, batches)}
    streams, state, first = work.start_streams("pruned", starts, work.leading(model))
    pair = Pair(layout, layout.dense, small, eye, streams, work.scratch("between", model.device), recipe.dtype)
    pair.fits |= as_figures(state)
    work.progress.step(first)
    for index in range(first, len(model.blocks)):
        start, part = time.perf_counter(), model.family.block(index)
        work.pass_through(small, index, _prune_block(pair, index, task), streams["small"], recipe.dtype)
        work.save_streams("pruned", index, streams, as_state(pair.fits))
        work.progress.step()
        work.progress.done("pruned", part, time.perf_counter() - start)
    notes: dict[str, Any] = by_kind(pair.fits)
    if refits_head(model):
        if not work.written(model.family.head):
            seen = refit_head(pair, recipe.seed, work, HEAD_RATE)
            work.write(model, model.family.head, write_head(model, seen, eye))
        notes["head"] = head_notes(work)
    return notes


def refits_head(model: StreamedModel) -> bool:
    """A head that is tied to the embedding stays as that is."""
    return not model.head_is_tied and fits_head(model)


def _prune_block(pair: Pair, index: int, task: Task) -> Tensors:
    """The block's parameters as they are stored, by name within it; the dense stream goes past it."""
    gradients, anatomy = task.gradients(index), pair.dense.anatomy[index]

    def readers(norm: Norm, tensors: Tensors) -> None:
        """One map from what the readers see now to what they saw serves all: their target is W T."""
        names = tuple(name for name in norm.readers if name not in anatomy.spared)
        if names:
            data = pair.reader_data(index, index, norm, tensors)
            weights = torch.cat([tensors[f"{name}.weight"].float() for name in names])
            prior = torch.eye(weights.shape[1], dtype=torch.float32, device=weights.device)
            fit = ridge(data, prior, weights.T @ weights, pair.guess(index, norm.label))
            pair.fits[f"{index}.{norm.label}"] = fit.strength
            target = Fit(weights @ fit.weight, fit.strength)
            _prune_together(pair, index, names, target, data, task, gradients, tensors)
        if anatomy.experts and norm is anatomy.norms[-1]:
            _prune_experts(pair, index, anatomy.experts, task, tensors)

    def writer(name: str, target: Callable[[int], Tensor], tensors: Tensors) -> None:
        data = pair.writer_data(index, index, name, target, tensors)
        fit = ridge(data, tensors[f"{name}.weight"], guess=pair.guess(index, name))
        pair.fits[f"{index}.{name}"] = fit.strength
        _prune_together(pair, index, (name,), fit, data, task, gradients, tensors)

    def begin(dense: Tensors) -> Tensors:
        return dense | (gathered(pair.layout, index, pair.streams["dense"]) if task.reorders else {})

    return pair.through_block(index, begin, readers, writer)


def _prune_experts(pair: Pair, index: int, experts: Experts, task: Task, tensors: Tensors) -> None:
    """Each expert on the tokens that the pruned model routes to it. These need not be those it had in the dense model,
    so it aims at what it computed itself."""
    for parameter in experts.parameters:
        tensors[parameter] = tensors[parameter].to(pair.small.dtype, copy=True)  # the dense block is still to run
    with pair.small.placed(pair.small.family.block(index), tensors):
        groups = [(name,) for name in experts.matrices if name not in pair.dense.anatomy[index].spared]
        prune_seen(pair.small, index, pair.streams["small"], groups, task, pair.fits)


def _prune_together(
    pair: Pair,
    index: int,
    names: tuple[str, ...],
    target: Fit,
    data: Regression,
    task: Task,
    gradients: Mapping[str, TokenGradients],
    tensors: dict[str, Tensor],
) -> None:
    """Prune linears that read the same input, whose kept weights are to come near target.weight: [out, in]."""
    part = pair.dense.family.block(index)
    gram = data.join().xx
    if not torch.isfinite(gram.diagonal()).all():
        raise RunFailure(f"inputs of {part}.{names[0]} hold NaN or Inf")
    strength = max(DAMPING, target.strength) if math.isfinite(target.strength) else DAMPING
    curvature = curvature_of(
        gram, f"{part}.{names[0]}", strength, [gradients[name] for name in names if name in gradients]
    )
    rows = [tensors[f"{name}.weight"].shape[0] for name in names]
    wanted = target.weight.to(gram.dtype)
    pattern = task.pattern([f"{part}.{name}" for name in names])
    found, _ = prune_tall(wanted, rows, pattern, task.choice, curvature)
    pair.fits[f"{index}.{names[0]} damping"] = curvature.damping
    lost = quadratic_loss(found - wanted, curvature).sum() / quadratic_loss(wanted, curvature).sum()
    pair.fits[f"{index}.{names[0]} predicted_error"] = float(lost)
    for name, part_found in zip(names, found.split(rows), strict=True):
        tensors[f"{name}.weight"] = pair.stored(index, f"{name}.weight", part_found)
