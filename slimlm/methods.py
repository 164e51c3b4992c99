"""The compression methods, by the name `--method` takes: one row each, with its paper and what it does.

A pruner's row says what it knows of the loss (a class in `prune/curvature.py`, by name), how it chooses weights (a
function of `prune/masks.py`) and what those that stay do about it (a function of `prune/updates.py`).
"""

from pathlib import Path
from typing import Any

from slimlm.method import Method
from slimlm.model.streamed import StreamedModel
from slimlm.prune import solved
from slimlm.prune.group import Row, name_of
from slimlm.prune.masks import MASKS
from slimlm.prune.plan import plan_prune
from slimlm.prune.run import run_prune
from slimlm.prune.updates import UPDATES
from slimlm.recipe import ROWS, Allocation, AnyStep, PruneStep, RecoverStep, RotateStep, SliceStep, Step
from slimlm.recipe import Row as StepRow
from slimlm.recover.needs import kept_bytes
from slimlm.recover.run import plan_recover, run_recover
from slimlm.slice import curves
from slimlm.slice.plan import plan_rotate, plan_slice, rotated_influence
from slimlm.slice.run import run_rotate, run_slice
from slimlm.statistics.sweep import swept_windows
from slimlm.statistics.token_gradients import Sample

GRADIENT_BYTES = 2  # they are kept in bf16


def _sweep(recipe: Step, model: StreamedModel) -> int:
    assert recipe.max_seq_length is not None
    return swept_windows(recipe.max_seq_length, len(model.blocks))


def _slicing_scratch(recipe: SliceStep | RotateStep, model: StreamedModel) -> int:
    """Three streams in the refit, or every block's input for the gradients, or all cuts and what they learn from."""
    refit = 3 * recipe.num_windows if isinstance(recipe, SliceStep) and recipe.refit else 0
    gradients = _sweep(recipe, model) if recipe.weighting == "loss" else 0
    cuts = 0
    if isinstance(recipe, SliceStep) and recipe.measures_widths:
        cuts = (curves.CUTS - 1) * curves.measured_on(recipe.num_windows) + min(curves.WINDOWS, recipe.num_windows)
    return max(refit, gradients, cuts)


def _slicing_calibrates(recipe: SliceStep, path: Path) -> bool:
    is_rotated = rotated_influence(path) is not None
    return recipe.refit or recipe.basis == "per-block" or not is_rotated or len(recipe.width_choices) > 1


def _pruning_scratch(recipe: PruneStep, model: StreamedModel) -> int:
    streams = 3 * recipe.num_windows if recipe.repairs else 0
    if recipe.allocation == "solved":
        streams = max(streams, solved.SCRATCH)
    if recipe.allocation == "owl":
        streams = max(streams, recipe.num_windows)
    return max(streams, _sweep(recipe, model)) if recipe.needs_gradients else streams


def _pruning_kept(recipe: PruneStep, model: StreamedModel) -> int:
    if not recipe.needs_gradients:
        return 0
    assert recipe.max_seq_length is not None
    sample = Sample(recipe.fisher_samples, recipe.fisher_unit == "sequence", recipe.seed)
    return GRADIENT_BYTES * sample.numbers(model, recipe.max_seq_length)


def pruning(
    name: str, summary: str, paper: str, row: Row, allocation: Allocation = "uniform", refits: bool = False
) -> Method[PruneStep]:
    """A method that sets weights to zero. allocation: where a recipe names none. refits: whether kept weights aim at
    what the dense model computes, and the head is refitted."""
    said = StepRow(row.curvature, name_of(row.mask), name_of(row.update), row.swaps, allocation, refits)

    class OwnStep(PruneStep):
        rows = {name: said}  # noqa: RUF012

    steps = PruneStep if ROWS.get(name) == said else OwnStep
    method = Method[PruneStep](
        name,
        summary,
        paper,
        steps,
        sparsity_of="weights in pruned matrices",
        plan=plan_prune,
        run=run_prune,
        calibrates=lambda recipe, path: recipe.curvature != "none" or recipe.allocation in ("owl", "solved"),
        scratch=_pruning_scratch,
        holds_out=lambda recipe: recipe.repairs,
        kept=_pruning_kept,
        row=row,
    )
    OwnStep.own_method = method
    return method


def _known(name: str, summary: str, paper: str) -> Method[PruneStep]:
    """One of the table that recipes have."""
    said = ROWS[name]
    row = Row(said.curvature, MASKS[said.mask], UPDATES[said.update], said.swaps)
    return pruning(name, summary, paper, row, said.allocation, said.refits)


TABLE: tuple[Method[Any], ...] = (
    Method[SliceStep](
        "slice",
        "delete directions of the residual stream and units of the blocks: smaller widths, fewer parameters",
        "https://arxiv.org/abs/2401.15024",
        SliceStep,
        sparsity_of="parameters",
        plan=plan_slice,
        run=run_slice,
        calibrates=_slicing_calibrates,
        scratch=_slicing_scratch,
        holds_out=lambda recipe: recipe.refit and recipe.basis == "shared",
    ),
    Method[RotateStep](
        "rotate",
        "move the residual stream into its principal directions, most important first, and delete nothing",
        "https://arxiv.org/abs/2401.15024",
        RotateStep,
        sparsity_of="parameters",
        plan=plan_rotate,
        run=run_rotate,
        calibrates=lambda recipe, path: True,
        scratch=_slicing_scratch,
        holds_out=lambda recipe: False,
    ),
    Method[RecoverStep](
        "recover",
        "train what is left of a model towards the dense one; its zeros and widths stay",
        "https://arxiv.org/abs/1503.02531",
        RecoverStep,
        sparsity_of="parameters",
        plan=plan_recover,
        run=run_recover,
        calibrates=lambda recipe, path: True,
        scratch=lambda recipe, model: 0,
        holds_out=lambda recipe: True,
        kept=kept_bytes,
    ),
    # SparseGPT's mask, refined; the exact minimiser on it, as in OBC, aimed at the dense model (`towards_dense.py`).
    _known(
        "slimlm",
        "second-order masks refined by swaps, kept weights solved jointly towards the dense model: loses least",
        "https://arxiv.org/abs/2301.00774",
    ),
    _known(
        "sparsegpt",
        "prune by second-order scores from left to right, the columns to come making up for those that went",
        "https://arxiv.org/abs/2301.00774",
    ),
    _known(
        "obc",
        "prune weight after weight, greedily and with exact second-order updates; slow",
        "https://arxiv.org/abs/2208.11580",
    ),
    # Static M-FAC: every row is a block of the Fisher matrix, and weights of the whole model compete.
    _known(
        "mfac",
        "prune what the Fisher information of token gradients says costs least, over the whole model",
        "https://arxiv.org/abs/2107.03356",
    ),
    # And oBERT (arXiv 2203.07259): as mfac, with 64 neighbouring weights of a row in a block.
    _known(
        "woodfisher",
        "as mfac, with Fisher information in blocks of neighbouring weights",
        "https://arxiv.org/abs/2004.14340",
    ),
    _known(
        "wanda",
        "set the weights to zero that are smallest times the norm of their input, row by row",
        "https://arxiv.org/abs/2306.11695",
    ),
    _known(
        "taylor",
        "set the weights to zero that are smallest times their gradient, which the loss feels least at first",
        "https://arxiv.org/abs/1906.10771",
    ),
    _known(
        "random",
        "set any weights to zero; needs no data: what a method has to beat",
        "https://arxiv.org/abs/2003.03033",
    ),
    _known(
        "magnitude",
        "set the smallest weights of each matrix to zero; needs no data",
        "https://arxiv.org/abs/1506.02626",
    ),
)
METHODS = {method.name: method for method in TABLE}


def method_of(step: AnyStep) -> Method[Any]:
    """The method of a recipe's step."""
    own = step.own_method
    return own if isinstance(own, Method) else METHODS[step.method]
