"""Slicing with one basis for the whole model (after SliceGPT, arXiv 2401.15024).

SliceGPT gives every block its own PCA basis and pays for it with two dense shortcuts per block that no stock class
has. With one orthonormal basis S: [hidden, width] for the whole residual stream the shortcuts are S^T S = I: the result
is the same architecture with smaller widths. What is removed is spent over all of them (`methods/budget.py`), and the
weights are refitted to what the sliced stream brings them (`methods/refit.py`).
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.checkpoint.manifest import read_manifest
from slimlm.errors import UserError
from slimlm.linalg.pca import without_mean
from slimlm.methods.basis import Basis, find_basis, find_influence
from slimlm.methods.budget import CUTS, WINDOWS, candidates, choose, removed_share
from slimlm.methods.gradients import sweep_windows
from slimlm.methods.head import fits_head, head_notes, refit_head
from slimlm.methods.per_block import plan_per_block, run_per_block
from slimlm.methods.plan import Method, Outcome, Plan
from slimlm.methods.prune_block import by_kind, warn_of_starved
from slimlm.methods.refit import refit_blocks
from slimlm.methods.rotation import head_map, slice_block, slice_embedding, unchanged, write_head, write_tied_norm
from slimlm.methods.widths import BLOCK, Layout, Widths
from slimlm.recipe import RotateStep, SliceStep
from slimlm.walk import StreamedModel
from slimlm.work import Rows, Work


def plan_slice(model: StreamedModel, recipe: SliceStep) -> Plan:
    """The largest of the splits that give the requested share of all parameters; which it will be the run settles.

    Raises UserError when none does, or the widths given by hand cannot be had.
    """
    if recipe.skip and (recipe.basis == "per-block" or recipe.budget == "hidden" or not recipe.refit):
        raise UserError(
            "--skip: a rotation of the stream changes every module; leave out --basis, --budget and --no-refit"
        )
    if recipe.basis == "per-block":
        return plan_per_block(model, recipe)
    layout = Layout(model)
    splits = _splits(layout, recipe)
    plan = layout.plan(max(splits, key=layout.parameters), recipe)
    uneven = uneven_line(layout, splits)
    if len(splits) == 1:
        return replace(plan, remark=uneven)
    remark = f"one of {len(splits)} splits over {_axes(layout, splits)}, chosen by the loss on held-out windows"
    remark += f"\n{uneven}" if uneven else ""
    whole = [split for split in splits if split.blocks == layout.dense.blocks] or splits
    return replace(plan, changes={}, remark=remark, widths="/".join(dict.fromkeys(split.inside for split in whole)))


def _splits(layout: Layout, recipe: SliceStep) -> list[Widths]:
    if recipe.widths:
        return [_by_hand(layout, recipe, choice) for choice in recipe.width_choices]
    splits = candidates(layout, recipe)
    if not splits:
        steps = f" in multiples of {recipe.round_to}" if recipe.round_to else ""
        raise UserError(f"sparsity {recipe.sparsity:g} cannot be reached{steps}: {_nearest(layout, recipe)}")
    return splits


def _by_hand(layout: Layout, recipe: SliceStep, given: dict[str, int]) -> Widths:
    """Raises UserError for widths that the model does not have or that the config class refuses."""
    dense = layout.dense
    tied = given.pop("tied", 0) > 0
    if tied and not layout.model.head_is_tied:
        raise UserError("--widths tied=1: the model's head is not tied to its embedding")
    if tied and not layout.ties_rotated:
        raise UserError(
            "--widths tied=1: the norm behind the embedding goes into its table, which the head cannot share"
        )
    for name, width in given.items():
        full = len(dense.blocks) if name == "blocks" else dense.of(name)
        if not 0 < width <= full:
            raise UserError(f"--widths {name}={width}: the model has {full or 'none that can be changed'}")
        if name in layout.fixed and width != full:
            raise UserError(f"--widths {name}: with --skip it stays as it is, since all blocks are cut alike")
    blocks = tuple(range(given.get("blocks", len(dense.blocks))))
    widths = Widths(
        given.get("hidden", dense.hidden), given.get("mlp", dense.mlp), given.get("groups", dense.groups), blocks, tied
    )
    if not recipe.refit and (widths.mlp, widths.groups) != (dense.mlp, dense.groups):
        raise UserError("--widths mlp and groups need the refit that makes up for what goes: leave out --no-refit")
    if blocks != dense.blocks and layout.model.family.numbered:
        raise UserError("--widths blocks: what a block of this model computes depends on its number")
    if widths.mlp != dense.mlp and widths.mlp % layout.mlp_divisor:
        raise UserError(f"--widths mlp={widths.mlp}: experts' width is a multiple of {layout.mlp_divisor}")
    divisor = layout.divisor(widths.groups)
    if widths.hidden != dense.hidden and not layout.model.family.rotates:
        raise UserError(
            f"--widths hidden={widths.hidden}: hidden_size stays {dense.hidden}, as {_why_not(layout.model)}"
        )
    if widths.hidden % divisor:
        raise UserError(f"--widths hidden={widths.hidden}: this kind of model wants a multiple of {divisor}")
    return widths


def _why_not(model: StreamedModel) -> str:
    return f"{model.config.model_type!r} cannot be rotated: {model.family.why_not}"


def _nearest(layout: Layout, recipe: SliceStep) -> str:
    """How near one can come, as a hint."""
    if not layout.model.family.rotates and not recipe.refit:
        return (
            f"{_why_not(layout.model)}; what is left to cut needs the refit that makes up for it: leave out --no-refit"
        )
    near: list[Widths] = []
    for step in range(1, 41):
        for sparsity in (recipe.sparsity - step / 100, recipe.sparsity + step / 100):
            if 0 < sparsity < 1:
                near += candidates(layout, recipe.model_copy(update={"sparsity": sparsity}))
        if near:
            best = min(near, key=lambda widths: abs(removed_share(layout, widths) - recipe.sparsity))
            return f"the nearest is {removed_share(layout, best):.4f} ({best})"
    return "no smaller width is left"


def uneven_line(layout: Layout, splits: list[Widths]) -> str | None:
    """What widths cost that are no multiples of 32, where none of the splits does without."""
    uneven = [layout.uneven(split) for split in splits]
    if not all(uneven):
        return None
    names = ", ".join(f"{name} {row}" for name, row in uneven[0].items()) if len(splits) == 1 else "these"
    return (
        f"{names}: no multiple of {BLOCK}, so quantised files (GGUF, int4) will hold such matrices unquantised, and "
        "kernels run them slower"
    )


def _axes(layout: Layout, splits: list[Widths]) -> str:
    varied = [
        name for name in ("hidden", "mlp", "groups", "blocks", "tied") if len({split.of(name) for split in splits}) > 1
    ]
    return ", ".join(varied)


@torch.no_grad()
def run_slice(model: StreamedModel, plan: Plan, batches: list[Tensor], work: Work) -> Outcome:
    """Find the basis in one pass over the blocks, settle the widths, and write the blocks in a last one."""
    recipe, layout = plan.recipe, Layout(model)
    assert isinstance(recipe, SliceStep)
    if recipe.basis == "per-block":
        return run_per_block(model, plan, batches, work)
    splits = _splits(layout, recipe)
    found = _basis(layout, splits, recipe, batches, work)
    widths, notes = _settle(layout, splits, found, recipe, batches, work)
    plan = layout.plan(widths, recipe)
    for name, (before, after) in plan.changes.items():
        work.progress.line(f"{name}: {before} -> {after}")
    stays = layout.stays(widths)
    basis = (
        torch.eye(widths.hidden, dtype=torch.float32, device=model.device) if stays else found.of(widths.hidden).float()
    )
    notes = {**found.notes, **notes}
    if uneven := layout.uneven(widths):
        notes["uneven"] = uneven
    del found  # larger than what is kept of it
    work.lay_out(plan.tensors, plan.carrier)
    if recipe.refit:
        notes["refit"] = _refit(layout, widths, plan, basis, batches, work)
    else:
        rotate_model(layout, widths, basis, work)
    work.settle()
    kept = widths.blocks if len(widths.blocks) < len(model.blocks) else None
    return Outcome(plan, {**notes, "widths": str(widths)}, lambda block: basis, kept)


def _basis(layout: Layout, splits: list[Widths], recipe: SliceStep, batches: list[Tensor], work: Work) -> Basis:
    """To choose widths with; the stream's own where none of the splits moves it."""
    model = layout.model
    if is_rotated(model.checkpoint.path):
        return _own_basis(model)
    if all(map(layout.stays, splits)):
        return find_influence(model, batches, work)
    return find_basis(model, recipe, batches, work)


def _scratch(recipe: SliceStep | RotateStep, model: StreamedModel) -> int:
    """Windows on disk at once: three streams in the refit, or every block's input for the gradients, or all cuts."""
    refit = 3 * recipe.num_calibration_samples if isinstance(recipe, SliceStep) and recipe.refit else 0
    gradients = sweep_windows(recipe, model)
    cuts = WINDOWS * CUTS
    return max(refit, gradients if recipe.weighting == "loss" else 0, cuts)


def is_rotated(path: Path) -> bool:
    """Whether `slimlm rotate` wrote the checkpoint: its stream's directions are in order of importance already."""
    manifest = read_manifest(path)
    return manifest is not None and "influence" in manifest.get("method", {})


def _own_basis(model: StreamedModel) -> Basis:
    eye = torch.eye(model.config.hidden_size, dtype=torch.float64, device=model.device)
    manifest = read_manifest(model.checkpoint.path) or {}
    influence = torch.tensor(manifest["method"]["influence"], dtype=torch.float64)
    notes = {"basis": "the checkpoint's own, as `slimlm rotate` left it"}
    centred = model.family.centred
    return Basis(without_mean(len(eye), model.device) if centred else eye, influence, notes, centred)


def plan_rotate(model: StreamedModel, recipe: RotateStep) -> Plan:
    """The same widths; an untied head where the final norm's gain is not constant."""
    if not model.family.rotates:
        raise UserError(_why_not(model))
    layout = Layout(model, turns=True)
    return layout.plan(layout.dense, recipe)


@torch.no_grad()
def run_rotate(model: StreamedModel, plan: Plan, batches: list[Tensor], work: Work) -> Outcome:
    """Find the basis and write every tensor in it."""
    assert isinstance(plan.recipe, RotateStep)
    found, layout = find_basis(model, plan.recipe, batches, work), Layout(model, turns=True)
    basis = found.of(layout.dense.hidden).float()
    work.lay_out(plan.tensors, plan.carrier)
    rotate_model(layout, layout.dense, basis, work)
    work.settle()
    return Outcome(plan, {**found.notes, "influence": found.influence.tolist()}, lambda block: basis)


def _settle(
    layout: Layout, splits: list[Widths], found: Basis, recipe: SliceStep, batches: list[Tensor], work: Work
) -> tuple[Widths, dict[str, Any]]:
    record = work.journal.last("widths")
    if record:
        return Widths(**{**record["widths"], "blocks": tuple(record["widths"]["blocks"])}), record["notes"]
    widths, notes = choose(layout, splits, found, batches, work, recipe.refit)
    work.journal.commit("widths", widths=vars(widths), notes=notes)
    return widths, notes


def _refit(
    layout: Layout, widths: Widths, plan: Plan, basis: Tensor, batches: list[Tensor], work: Work
) -> dict[str, Any]:
    for name in layout.model.family.embeddings:
        _write_part(layout.model, work, name, slice_embedding(layout.model, name, basis, widths.tied))
    _write_outer(layout, widths, work)
    pair = refit_blocks(layout, widths, plan, basis, batches, work)
    model, notes = layout.model, dict[str, Any]()
    if layout.keeps_tie(widths):
        _write_part(model, work, model.family.head, write_tied_norm(model, basis))
    elif not fits_head(model):
        _write_part(model, work, model.family.head, write_head(model, head_map(model, basis), basis))
    else:
        if not work.written(model.family.head):
            seen = refit_head(pair, plan.recipe.seed, work)
            _write_part(model, work, model.family.head, write_head(model, seen, basis))
        notes["head"] = head_notes(work)
    notes |= by_kind(pair.fits)
    warn_of_starved(notes)
    return notes


@torch.no_grad()
def rotate_model(layout: Layout, widths: Widths, basis: Tensor, work: Work) -> None:
    """Write every tensor of the model in the basis: [hidden, width], and nothing more."""
    model = layout.model
    work.progress.stage("slicing", len(widths.blocks) + 1)
    for name in model.family.embeddings:
        _write_part(model, work, name, slice_embedding(model, name, basis, widths.tied))
    for place, block in enumerate(widths.blocks):
        _write_part(model, work, model.family.block(place), _slice_block_of(layout, widths, block, place, basis))
        work.progress.step()
    _write_outer(layout, widths, work)
    tied = layout.keeps_tie(widths)
    tensors = write_tied_norm(model, basis) if tied else write_head(model, head_map(model, basis), basis)
    _write_part(model, work, model.family.head, tensors)
    work.progress.step()


def _write_part(model: StreamedModel, work: Work, name: str, tensors: Iterator[tuple[str, Tensor | Rows]]) -> None:
    """tensors: a generator, not begun when an earlier process has written the part."""
    start = time.perf_counter()
    if not work.written(name):
        work.write(model, name, tensors)
        work.progress.done("sliced", name, time.perf_counter() - start)


def _write_outer(layout: Layout, widths: Widths, work: Work) -> None:
    """What is neither in a block nor touches the stream that moves."""
    model, norm = layout.model, layout.model.family.embedding_norm
    kept = model.family.outer if layout.folds(widths) else (*model.family.outer, norm)
    for name in model.outside:
        if name in kept:
            _write_part(model, work, name, unchanged(model, name))


def _slice_block_of(
    layout: Layout, widths: Widths, index: int, place: int, basis: Tensor
) -> Iterator[tuple[str, Tensor]]:
    model = layout.model
    with model.block(index):
        for name, tensor in slice_block(model.weights(index), model.anatomy[index], basis, layout.zeros(widths)):
            yield f"{model.family.block(place)}.{name}", tensor


SLICE = Method[SliceStep](
    summary="delete directions of the residual stream and units of the blocks: smaller widths, fewer parameters",
    paper="https://arxiv.org/abs/2401.15024",
    sparsity_of="parameters",
    calibrates=lambda recipe, path: (
        recipe.refit or recipe.basis == "per-block" or not is_rotated(path) or len(recipe.width_choices) > 1
    ),
    plan=plan_slice,
    run=run_slice,
    scratch=_scratch,
    holds_out=lambda recipe: recipe.refit and recipe.basis == "shared",
)
ROTATE = Method[RotateStep](
    summary="move the residual stream into its principal directions, most important first, and delete nothing",
    paper="https://arxiv.org/abs/2401.15024",
    sparsity_of="parameters",
    calibrates=lambda recipe, path: True,
    plan=plan_rotate,
    run=run_rotate,
    scratch=_scratch,
)
