"""What slicing is going to do, as far as it can be told, before any work."""

from dataclasses import replace
from pathlib import Path

from slimlm.checkpoint.manifest import read_manifest
from slimlm.errors import UserError
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import RotateStep, SliceStep
from slimlm.run import Plan
from slimlm.slice.candidates import axes_of, splits_for, uneven_line
from slimlm.slice.config import plan_widths
from slimlm.slice.per_block import plan_per_block
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout


def plan_slice(model: StreamedModel, recipe: SliceStep) -> Plan:
    """The largest of the splits that give the requested share of all parameters; which it will be the run settles.

    Raises UserError when none does, or the widths given by hand cannot be had.
    """
    if recipe.skip and (recipe.basis == "per-block" or recipe.budget == "hidden" or not recipe.refit):
        raise UserError("--skip: a rotation of the stream changes every module; leave out basis, budget and --no-refit")
    if recipe.basis == "per-block":
        return plan_per_block(model, recipe)
    shapes = Shapes(Layout(model))
    layout, splits = shapes.layout, splits_for(shapes, recipe)
    plan = plan_widths(shapes, max(splits, key=shapes.parameters), recipe.dtype)
    uneven = uneven_line(layout, splits)
    if len(splits) == 1:
        return replace(plan, remark=uneven)
    remark = f"one of {len(splits)} splits over {axes_of(splits)}, chosen by the loss on held-out windows"
    remark += f"\n{uneven}" if uneven else ""
    whole = [split for split in splits if split.blocks == layout.dense.blocks] or splits
    return replace(plan, changes={}, remark=remark, widths="/".join(dict.fromkeys(split.inside for split in whole)))


def plan_rotate(model: StreamedModel, recipe: RotateStep) -> Plan:
    """The same widths; an untied head where the final norm's gain is not constant. Raises UserError for a model whose
    stream cannot be rotated."""
    if not model.family.rotates:
        raise UserError(model.why_not_rotated)
    shapes = Shapes(Layout(model, turns=True))
    return plan_widths(shapes, shapes.dense, recipe.dtype)


def rotated_influence(path: Path) -> list[float] | None:
    """How much each block changes the stream, of a checkpoint that `slimlm rotate` wrote: the directions of its stream
    are in order of importance already."""
    manifest = read_manifest(path)
    found: list[float] | None = manifest.get("method", {}).get("influence") if manifest else None
    return found
