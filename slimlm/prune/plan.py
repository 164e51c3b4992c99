"""What pruning is going to do, and what it cannot do, before any work."""

import math
from dataclasses import replace

import torch

from slimlm.errors import UserError
from slimlm.fit.lm_head import fits_head
from slimlm.model.streamed import StreamedModel
from slimlm.prune.group import Row, name_of
from slimlm.prune.masks import MASKS
from slimlm.prune.updates import UPDATES
from slimlm.recipe import PruneStep, SliceStep
from slimlm.run import Plan


def plan_prune(model: StreamedModel, recipe: PruneStep) -> Plan:
    """The same tensors, some of whose numbers will be zero. Raises UserError for a pattern no matrix has room for."""
    row = row_of(recipe)
    row.check()
    if recipe.allocation == "solved" and row.sees_fisher:
        replace(row, curvature="gram").check()  # blocks are measured by their inputs alone
    model.require_declared("prune")
    for name, shape in model.matrices.items():
        require_room(name, shape, recipe)
    if recipe.tile and recipe.sparsity * sum(map(math.prod, model.matrices.values())) < math.prod(recipe.tile):
        raise UserError(f"sparsity {recipe.sparsity:g} is less than one tile of {recipe.pattern}")
    if recipe.needs_gradients and recipe.fisher_unit == "sequence" and model.family.experts:
        raise UserError("fisher_unit sequence: an expert sees single tokens, not sequences")
    return Plan.like(model, recipe.dtype)


def require_room(name: str, shape: torch.Size, recipe: PruneStep) -> None:
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
        require_room(name, shape, later)
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    for size, what in ((head, "heads"), (slicing.round_to or math.lcm(*later.tile), "widths that are multiples")):
        if size % math.lcm(*later.tile):
            raise UserError(
                f"{what} of {size} are not whole tiles of {later.pattern}, which is to be pruned after slicing"
            )


def row_of(recipe: PruneStep) -> Row:
    """What a resolved recipe prunes by; its method's own mask and update first, where that is not in the table."""
    own: Row | None = getattr(recipe.own_method, "row", None)
    mask_of, update_of = dict(MASKS), dict(UPDATES)
    if own is not None:
        mask_of[name_of(own.mask)], update_of[name_of(own.update)] = own.mask, own.update
    return Row(recipe.curvature, mask_of[recipe.mask], update_of[recipe.update], recipe.swaps)


def refits_head(model: StreamedModel) -> bool:
    """A head that is tied to the embedding stays as that is."""
    return not model.head_is_tied and fits_head(model)


def reorders(recipe: PruneStep, row: Row) -> bool:
    """Whether neurons are to be gathered first; gradients know them by their places."""
    return recipe.tile is not None and recipe.reorder and "fisher" not in row.curvature
