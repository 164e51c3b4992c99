"""Setting single weights to zero, block after block: what data the methods of `methods/matrix.py` get.

Every linear inside the blocks is pruned, experts' too; embeddings, head and routers are not. Each block sees what the
pruned blocks before it pass on, and an expert the tokens that are routed to it. Zeros take as much room as other
numbers: the checkpoint keeps its size, and stock kernels their speed.
"""

import copy
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import RunFailure, UserError
from slimlm.linalg.masks import Tile
from slimlm.methods.allocation import allocate
from slimlm.methods.fisher import gather_gradients, gradient_names, gradient_numbers, gradients_of, row_fisher
from slimlm.methods.gather import gathered
from slimlm.methods.gradients import sweep_windows
from slimlm.methods.inputs import input_statistics
from slimlm.methods.matrix import Pattern, Task, choice_of
from slimlm.methods.plan import Method, Outcome, Plan, require_declared
from slimlm.methods.prune_block import by_kind, prune_by_magnitude, prune_seen, prune_together, warn_of_starved
from slimlm.methods.repair import prune_and_repair, refits_head
from slimlm.methods.rotation import unchanged
from slimlm.methods.solved import SCRATCH as SOLVED_SCRATCH
from slimlm.methods.widths import Layout
from slimlm.modeling import own_files
from slimlm.recipe import FISHERS, PruneStep, SliceStep
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work, as_figures, as_state


def pruning(summary: str, paper: str) -> Method[PruneStep]:
    """A method that is one row of the table."""
    return Method[PruneStep](
        summary=summary,
        paper=paper,
        sparsity_of="weights in pruned matrices",
        calibrates=lambda recipe, path: recipe.curvature != "none" or recipe.allocation in ("owl", "solved"),
        plan=plan_prune,
        run=run_prune,
        scratch=_scratch,
        gradients=lambda recipe, model: gradient_numbers(recipe, model) if recipe.needs_gradients else 0,
        holds_out=lambda recipe: recipe.repairs,
    )


def _scratch(recipe: PruneStep, model: StreamedModel) -> int:
    streams = 3 * recipe.num_calibration_samples if recipe.repairs else 0
    if recipe.allocation == "solved":
        streams = max(streams, SOLVED_SCRATCH)
    if recipe.allocation == "owl":
        streams = max(streams, recipe.num_calibration_samples)
    return max(streams, sweep_windows(recipe, model)) if recipe.needs_gradients else streams


def plan_prune(model: StreamedModel, recipe: PruneStep) -> Plan:
    """The same tensors, some of whose numbers will be zero. Raises UserError for a pattern no matrix has room for."""
    named = {name: tensor for name, tensor in model.model.state_dict().items() if name not in _tied(model)}
    require_declared(model, "prune")
    for name, shape in model.matrices.items():
        _require_room(name, shape, recipe)
    if recipe.tile and recipe.sparsity * sum(map(math.prod, model.matrices.values())) < math.prod(recipe.tile):
        raise UserError(f"sparsity {recipe.sparsity:g} is less than one tile of {recipe.pattern}")
    tensors = {
        name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
        for name, tensor in checkpoint_tensors(model.model, named).items()
    }
    config = copy.deepcopy(model.config)
    config.dtype = next(iter(tensors.values())).dtype
    parameters = sum(torch.Size(spec.shape).numel() for spec in tensors.values())
    files = own_files(config)  # of a checkpoint that slicing made
    return Plan(config, tensors, parameters, recipe, model.model, files=files)


def _require_room(name: str, shape: torch.Size, recipe: PruneStep) -> None:
    """Raises UserError for a matrix [out, in] that the pattern does not divide."""
    out, inputs = recipe.tile or (1, recipe.pattern_sizes[1] or 1)
    for size, of, kind in ((shape[0], out, "outputs"), (shape[1], inputs, "inputs")):
        if size % of:
            raise UserError(f"{name} has {size} {kind}, which pattern {recipe.pattern} does not divide")


def require_room_later(model: StreamedModel, slicing: SliceStep, later: PruneStep) -> None:
    """Raises UserError for tiles that a slice, whichever widths it gets, may not be whole of."""
    if not later.tile:
        return
    for name, shape in model.matrices.items():
        _require_room(name, shape, later)
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    for size, what in ((head, "heads"), (slicing.round_to or math.lcm(*later.tile), "widths that are multiples")):
        if size % math.lcm(*later.tile):
            raise UserError(
                f"{what} of {size} are not whole tiles of {later.pattern}, which is to be pruned after slicing"
            )


def _tied(model: StreamedModel) -> set[str]:
    return set(model.model.all_tied_weights_keys)


@torch.no_grad()
def run_prune(model: StreamedModel, plan: Plan, batches: list[Tensor], work: Work) -> Outcome:
    """Prune block after block, and write each."""
    recipe = plan.recipe
    assert isinstance(recipe, PruneStep)
    choice, repairs = choice_of(recipe), recipe.repairs
    work.lay_out(plan.tensors, plan.carrier)
    later = [model.family.final_norm, model.family.head] if repairs and refits_head(model) else []
    for part in model.outside:
        if part not in later and not work.written(part):
            work.write(model, part, unchanged(model, part))
    if recipe.needs_gradients:
        gather_gradients(model, recipe, batches, work)
    counts = allocate(model, recipe, choice, work, batches, partial(_dense_norms, model, {}, batches, work))
    work.clear_scratch()
    if recipe.tile:
        counts = _whole_tiles(counts, recipe.tile)
    task = Task(choice, partial(_pattern, counts, recipe), recipe.dtype)
    if "fisher" in choice.curvature:  # which knows neurons by their places
        task = replace(task, gradients=partial(gradients_of, model, work))
    else:
        task = replace(task, reorders=recipe.tile is not None and recipe.reorder)
    notes: dict[str, Any] = {} if recipe.allocation == "uniform" else {"allocation": _shares(model, counts)}
    if choice.curvature in ("none", *FISHERS):
        notes |= _prune_apart(model, recipe, task, work)
    elif repairs:
        notes |= prune_and_repair(model, recipe, task, batches, work)
    else:
        notes |= _prune_seeing(model, task, batches, work)
    warn_of_starved(notes)
    work.settle()
    return Outcome(plan, notes, zeros=_zeros_written(model, work))


def _shares(model: StreamedModel, counts: dict[str, int]) -> dict[str, float]:
    sizes = model.matrices
    return {name: round(count / sizes[name].numel(), 4) for name, count in counts.items()}


def _dense_norms(
    model: StreamedModel, started: dict[str, Stream], batches: list[Tensor], work: Work, index: int
) -> dict[str, Tensor]:
    """Norms of the inputs of a block's linears in the dense model, which is walked through block after block."""
    if not started:
        started["dense"] = model.embed(batches, work.scratch("dense", model.device))
    found = input_statistics(model, index, started["dense"], norms=True, onward=True).statistics
    return {name: found[first] for name, first in model.anatomy[index].first_of.items() if first in found}


def _prune_apart(model: StreamedModel, recipe: PruneStep, task: Task, work: Work) -> dict[str, Any]:
    """Without data, or with gradients of the dense model, blocks do not depend on one another: finished ones are left
    out."""
    work.progress.stage("pruning", len(model.blocks))
    layout = Layout(model)
    for index in range(len(model.blocks)):
        start, part = time.perf_counter(), model.family.block(index)
        if not work.written(part):
            with model.block(index) as block:
                if task.reorders:
                    _reorder(layout, index)
                if task.choice.curvature == "none":
                    for names in model.anatomy[index].inputs:
                        prune_together(block, part, names, task, None)
                else:
                    _prune_by_gradients(model, index, block, recipe, task)
                work.write(model, part, ((f"{part}.{name}", value) for name, value in model.weights(index).items()))
        work.progress.step()
        work.progress.done("pruned", part, time.perf_counter() - start)
    return _without_gradients(model, task, work)


def _reorder(layout: Layout, index: int, stream: Stream | None = None) -> None:
    weights = layout.model.weights(index)
    for name, tensor in gathered(layout, index, stream).items():
        weights[name].copy_(tensor)


def _prune_by_gradients(model: StreamedModel, index: int, block: nn.Module, recipe: PruneStep, task: Task) -> None:
    part, found = model.family.block(index), task.gradients(index)
    for name in model.anatomy[index].linears:
        if name not in found:  # an expert that no token reached
            prune_by_magnitude(block, part, (name,), task)
            continue
        inverse = row_fisher(found[name], recipe.fisher_damping, task.choice.curvature == "block-fisher")
        try:
            prune_together(block, part, (name,), task, inverse)
        except ValueError as error:
            raise RunFailure(f"{part}.{name} cannot be pruned: {error}") from error


def _without_gradients(model: StreamedModel, task: Task, work: Work) -> dict[str, Any]:
    """Experts that no token reached."""
    starved = {
        f"{model.family.block(index)}.{name}": 0
        for index, anatomy in enumerate(model.anatomy)
        if anatomy.experts and "fisher" in task.choice.curvature
        for name in sorted(set(anatomy.experts.matrices) - gradient_names(work, index) - anatomy.spared)
    }
    return {"starved_experts": starved} if starved else {}


def _prune_seeing(model: StreamedModel, task: Task, batches: list[Tensor], work: Work) -> dict[str, Any]:
    """Statistics of all linears' inputs in one pass over the stream, their pruning, and a pass through what is left."""
    work.progress.stage("pruning", len(model.blocks))
    streams, state, first = work.start_streams("calibration", {"pruned": (model, batches)}, work.leading(model))
    work.progress.step(first)
    figures, layout = as_figures(state), Layout(model)
    for index in range(first, len(model.blocks)):
        start, part = time.perf_counter(), model.family.block(index)
        with model.block(index):
            if task.reorders:
                _reorder(layout, index, streams["pruned"])
            prune_seen(model, index, streams["pruned"], model.anatomy[index].inputs, task, figures)
            work.pass_on(model, index, streams["pruned"], task.dtype)
        work.save_streams("calibration", index, streams, as_state(figures))
        work.progress.step()
        work.progress.done("pruned", part, time.perf_counter() - start)
    return by_kind(figures)


def _pattern(counts: dict[str, int], recipe: PruneStep, names: list[str]) -> Pattern:
    """How much goes of matrices, by their full names."""
    of = tuple(counts[name] for name in names)
    if recipe.tile:
        return Pattern(of, tile=recipe.tile)
    return Pattern(of, *recipe.pattern_sizes) if recipe.pattern else Pattern(of)


def _whole_tiles(counts: dict[str, int], tile: Tile) -> dict[str, int]:
    """Counts of weights in whole tiles, as many in all as there are nearest to as many weights."""
    area, wanted, taken = math.prod(tile), 0, 0
    found: dict[str, int] = {}
    for name, count in counts.items():
        wanted += count
        found[name] = round(wanted / area) * area - taken
        taken += found[name]
    return found


def _zeros_written(model: StreamedModel, work: Work) -> float:
    """Share of zeros in the pruned matrices, counted in what is on disk."""
    state = model.model.state_dict()
    owners = {name: name.rpartition(".")[0] for name in model.matrices}
    pruned = {owner if owner in state else f"{name}.weight" for name, owner in owners.items()}
    zeros = total = 0
    for name in checkpoint_tensors(model.model, {name: state[name] for name in pruned}):
        tensor = work.writer.places[name].read()
        zeros += int((tensor == 0).sum())
        total += tensor.numel()
    return zeros / total
