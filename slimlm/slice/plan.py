"""What slicing is going to do, as far as it can be told, before any work."""

from dataclasses import replace
from pathlib import Path

from slimlm.checkpoint.journal import last_record
from slimlm.checkpoint.manifest import read_manifest, stages_of
from slimlm.checkpoint.staging import Staging
from slimlm.errors import UserError
from slimlm.model.shape_times import StepTimes
from slimlm.model.step_times import step_times
from slimlm.model.streamed import StreamedModel
from slimlm.recipe import RotateStep, SliceStep
from slimlm.run import Plan
from slimlm.slice.candidates import axes_of, splits_for, uneven_line
from slimlm.slice.config import plan_widths
from slimlm.slice.decoding import TIMES, Decoding, products_to_time
from slimlm.slice.per_block import plan_per_block
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout, Widths


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
    lines = [*_predicted(shapes, recipe, splits), *filter(None, [uneven_line(layout, splits)])]
    if len(splits) == 1:
        return replace(plan, remark="\n".join(lines) or None)
    lines.insert(0, f"one of {len(splits)} splits over {axes_of(splits)}, chosen by the loss on held-out windows")
    whole = [split for split in splits if split.blocks == layout.dense.blocks] or splits
    return replace(
        plan, changes={}, remark="\n".join(lines), widths="/".join(dict.fromkeys(split.inside for split in whole))
    )


def _predicted(shapes: Shapes, recipe: SliceStep, splits: list[Widths]) -> list[str]:
    """What decoding takes and will take, where that is asked for."""
    if recipe.latency is None:
        return []
    decoding = Decoding(shapes)
    low, high = (float(taken) for taken in decoding.each(splits).aminmax())
    return [
        f"decoding, one sequence: {1000 * decoding.dense:,.3g} ms a token, predicted then: {1000 * low:,.3g} to "
        f"{1000 * high:,.3g} ms ({low / decoding.dense:.3f} to {high / decoding.dense:.3f} of it)"
    ]


def time_decoding(model: StreamedModel, recipe: SliceStep, known: StepTimes | None) -> StepTimes:
    """What decoding takes on this machine, which a latency needs: known, if that is of all the products it needs, or
    measured, in the dtype that is written. Raises UserError for a model of which nothing can be predicted."""
    wanted = products_to_time(Shapes(Layout(model)))
    if known is not None and wanted.keys() <= known.products.keys() and known.blocks <= len(model.blocks):
        return known
    return step_times(model, wanted, model.stored_dtype("", recipe.dtype))


def kept_times(output: Path, whole: Path | None = None) -> StepTimes | None:
    """What a run measured whose result is at `output`, or is to be, or was the first step of what is at `whole`."""
    record = last_record(Staging(output).work, TIMES)
    if record is None:
        manifest = read_manifest(output) if output.is_dir() else None
        record = manifest.get("method", {}).get("latency") if manifest else None
    if record is None and whole is not None and (manifest := read_manifest(whole)):
        record = next((stage["method"].get("latency") for stage in stages_of(manifest)), None)
    return StepTimes.read(**record["times"]) if record else None


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
