"""Pruning the linears of one input: curvature x mask x update.

They share what is known of that input and everything computed from it, and are pruned as one tall matrix: their rows do
not know of each other. How many weights go is settled per matrix.
"""

import hashlib
import marshal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.errors import UserError
from slimlm.linalg.gram import Gram, Squares
from slimlm.linalg.hessian import Hessian
from slimlm.model.block import Block, Group
from slimlm.model.stream import Stream
from slimlm.prune import masks, updates
from slimlm.prune.curvature import Curvature, Flat, Norms, able, damped
from slimlm.prune.masks import Chosen, Mask
from slimlm.prune.quota import Quota, Quotas
from slimlm.prune.updates import Update
from slimlm.ranks import Ranks
from slimlm.recipe import FISHERS, GRAMS, CurvatureName
from slimlm.statistics.grams import FEW, firsts, in_turn, input_sums
from slimlm.statistics.token_gradients import TokenGradients

Gradients = Mapping[str, TokenGradients]  # by linear, within its block


@dataclass(frozen=True)
class Row:
    """What a method prunes by: the name of a curvature, a mask and an update, and how often swaps refine the mask
    before a joint update."""

    curvature: CurvatureName
    mask: Mask
    update: Update
    swaps: int = 0

    def __str__(self) -> str:
        swaps = f", {self.swaps} swaps" if self.swaps else ""
        return f"{self.curvature}, {name_of(self.mask)}, {name_of(self.update)}{swaps}"

    @property
    def goes_left_to_right(self) -> bool:
        """Whether nothing of the curvature is needed but the factor that columns are settled by."""
        return (
            self.curvature == "gram"
            and self.mask is masks.columns
            and self.update in (updates.left_to_right, updates.none)
        )

    @property
    def sees_gram(self) -> bool:
        """Whether the inputs' Gram is looked at."""
        return self.curvature in GRAMS

    @property
    def sees_fisher(self) -> bool:
        """Whether nothing but gradients is looked at."""
        return self.curvature in FISHERS

    @property
    def sees_both(self) -> bool:
        """Whether gradients are looked at beside a Gram."""
        return self.curvature == "gram+fisher"

    def check(self) -> None:
        """Raises UserError where mask or update need what the curvature has not."""
        for kind, function in (("mask", self.mask), ("update", self.update)):
            if self.curvature not in able(function):
                known = " or ".join(able(function)) or "a class of its own: annotate its argument `curvature`"
                raise UserError(f"{kind} {name_of(function)} needs a curvature of {known}, not {self.curvature}")


BY_MAGNITUDE = Row("none", masks.magnitude, updates.none)


def name_of(function: Mask | Update) -> str:
    """What recipes call a mask or an update."""
    return function.__name__.replace("_", "-")


def code_hash(row: Row) -> str:
    """SHA-256 of what a row's own mask and update are compiled to."""
    codes = (row.mask.__code__, row.update.__code__)
    return hashlib.sha256(b"".join(marshal.dumps(code) for code in codes)).hexdigest()


def prune(weight: Tensor, curvature: Curvature, quota: Quota, row: Row) -> Chosen:
    """Prune stacked matrices: the pruned weight, [out, in] like the given one, and what is pruned, bool.

    Of a Gram with inputs that were never there: what such an input meets does not matter, so it goes first, and what
    need not go stays as it is.
    """
    if len(quota.rows) > 1 and weight.numel() > updates.CHUNK_ELEMENTS:  # copies of the whole would be too large
        found, pruned = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
        for rows, own in quota.apart():
            found[rows], pruned[rows] = prune(weight[rows], curvature.rows(rows), own, row)
        return found, pruned
    dead = curvature.dead if isinstance(curvature, Hessian) and curvature.dead.any() else None
    alive = weight if dead is None else weight.masked_fill(dead, 0)
    chosen = row.mask(alive, curvature, quota)
    found, pruned = row.update(alive, curvature, quota, chosen, row.swaps)
    return (found if dead is None else torch.where(dead & ~pruned, weight, found)), pruned


def prune_group(group: Group, curvature: Curvature, quotas: Quotas, row: Row) -> None:
    """Prune linears of one input in place; large ones one after another."""
    quota = quotas[group]
    parts = zip(group.apart(), quota.apart(), strict=True)
    if len(group.names) > 1 and group.elements > updates.CHUNK_ELEMENTS:
        for one, (rows, own) in parts:
            one.put(prune(one.tall(curvature.dtype), curvature.rows(rows), own, row)[0])
    else:
        group.put(prune(group.tall(curvature.dtype), curvature, quota, row)[0])


def curvatures(
    block: Block,
    stream: Stream,
    groups: Sequence[Group],
    row: Row,
    gradients: Gradients,
    figures: dict[str, float],
) -> Iterator[tuple[Group, Curvature, Row]]:
    """What a pass of the stream, which stays where it is, says of each group of linears of a block, loaded, as it is
    when the first is asked for; and what to prune it by. To be let go of before the next is asked for.

    Each rank gets the groups that it is to prune, and all of them what the others made of theirs. An expert that saw
    too few tokens is pruned by magnitude, and recorded in `figures`.
    """
    ranks = stream.deal.ranks
    for few in in_turn(groups):
        found: dict[str, float] = {}
        yield from known(block, stream, few, (row, gradients), found)
        share(ranks, few)
        figures |= ranks.merged(found)


def known(
    block: Block, stream: Stream, few: Sequence[Group], by: tuple[Row, Gradients], figures: dict[str, float]
) -> Iterator[tuple[Group, Curvature, Row]]:
    """The same for so few groups that their sums are in memory together, and without sharing what comes of it."""
    row, ranks = by[0], stream.deal.ranks
    kind: Callable[[int, torch.device], Gram] = Squares if row.curvature == "diagonal" else Gram
    owners = owners_of(ranks, few)
    sums = input_sums(block, stream, firsts(few), kind, owners=owners)
    for group in mine(ranks, few):
        ranks.note("solves")
        found = sums.pop(group.first, None)
        tokens = found.tokens if found else 0
        if group.is_expert and tokens < FEW * group.inputs:
            figures[f"{group.full_names[0]} starved_experts"] = tokens
            del found  # its Gram may be large
            yield group, Flat(), BY_MAGNITUDE
            continue
        assert found is not None
        yield group, _curvature(group, found, *by, figures), row
        del found


def owners_of(ranks: Ranks, groups: Sequence[Group]) -> list[int]:
    """The rank that prunes each of several groups."""
    return ranks.owners([group.cost for group in groups])


def mine(ranks: Ranks, groups: Sequence[Group]) -> list[Group]:
    """Those that this one prunes."""
    return [group for group, owner in zip(groups, owners_of(ranks, groups), strict=True) if owner == ranks.rank]


def share(ranks: Ranks, groups: Sequence[Group]) -> None:
    """Have everybody's groups as their owners made them."""
    for group, owner in zip(groups, owners_of(ranks, groups), strict=True):
        ranks.share(group.matrices, owner)


def _curvature(group: Group, found: Gram, row: Row, gradients: Gradients, figures: dict[str, float]) -> Curvature:
    if isinstance(found, Squares):
        return Norms(found.norms())
    own = [gradients[name] for name in group.names if name in gradients]
    curvature = damped(found.take(), group.full_names[0], gradients=own, upper_only=row.goes_left_to_right)
    figures[f"{group.full_names[0]} damping"] = curvature.damping
    return curvature
