"""How sparse each block is to be, solved for from measured losses.

Each block alone is pruned to a few sparsities and the rise of the loss on held-out windows measured. What blocks cost
is taken to add up; which of them takes how much is then a knapsack problem, solved by dynamic programming
(`linalg/budget.py`), as in SPDY (Frantar & Alistarh, arXiv 2201.13096), which solves it for speed and with errors of
layers in place of measured losses. No block is pruned further than it was measured, and a rise that is within its
standard error counts as that error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from slimlm.linalg.budget import LossCurve, cheapest_split
from slimlm.model.block import Block, Group
from slimlm.model.ends import nll
from slimlm.model.hidden import Scratch
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import every
from slimlm.prune import masks, updates
from slimlm.prune.curvature import Curvature, Flat
from slimlm.prune.group import Row, curvatures, known, mine, prune_group, share
from slimlm.prune.quota import Quotas

WINDOWS = 24  # held out, to measure a curve on, and as many to prune by
POINTS = (0.5, 1.0, 1.5, 2.0)  # of the sparsity asked for
MOST = 0.95  # sparse, at most
TOGETHER = 4  # blocks measured in one walk: their pruned streams wait on disk, all points of each
SCRATCH = WINDOWS * (TOGETHER * len(POINTS) + 2)  # windows on disk at once
LEFT_TO_RIGHT = Row("gram", masks.columns, updates.left_to_right)
Known = list[tuple[Group, Curvature, Row]]


def solved_shares(model: StreamedModel, sparsity: float, curves: Sequence[LossCurve]) -> dict[int, float]:
    """The share of its weights each block loses, by number, sparsity being at most MOST."""
    sizes = every(model, lambda block: sum(group.elements for group in block.groups))
    split = cheapest_split(curves, sizes, 100 * sparsity, round(100 * MOST))
    return {index: percent / 100 for index, percent in enumerate(split)}


@dataclass
class Measuring:
    """Losses of the model with one block pruned to so many percent.

    row: to prune by, in a quick way where there is one. learning, dense: streams of the dense model, to prune by and to
    measure on; they go past each block once. length: tokens of a window. losses: [windows] each, by block and percent.
    """

    model: StreamedModel
    row: Row
    sparsity: float
    learning: Stream
    dense: Stream
    scratch: Scratch
    length: int
    losses: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row = LEFT_TO_RIGHT if self.row.sees_gram else self.row

    @property
    def points(self) -> list[int]:
        """Percent of a block that go."""
        most = round(100 * MOST)
        return sorted({min(round(100 * self.sparsity * point), most) for point in POINTS} - {0})

    def curves(self, walk: Iterable[Block]) -> list[LossCurve]:
        """Of every block. walk: from every TOGETHER-th block to the end, again and again, in which the pruned
        streams of a few blocks at a time go on to the end of the model."""
        measured = 0
        cut: dict[tuple[int, int], Stream] = {}
        for block in walk:
            for stream in cut.values():
                block.advance(stream)
            block.facts = None
            if block.index == measured and len(cut) < TOGETHER * len(self.points):
                cut |= self._behind(block)
                block.facts = {}
                measured += 1
            if block.index == len(self.model.blocks) - 1:
                block.unload()
                self.losses |= dict(zip(cut, self._losses(cut.values()), strict=True))
                cut.clear()
                self.scratch.clear("cut-*")
        (before,) = self._losses([self.dense])
        self.scratch.clear()
        return every(
            self.model,
            lambda block: LossCurve.measured(
                [(percent, self.losses[block.index, percent]) for percent in self.points], before
            ),
        )

    def _losses(self, streams: Iterable[Stream]) -> list[Tensor]:
        """Of each window, [windows], mean over tokens, of each stream."""
        return [of_window / (self.length - 1) for of_window in nll(self.model, streams)]

    def _behind(self, block: Block) -> dict[tuple[int, int], Stream]:
        """The dense stream behind a block, its weights loaded, pruned to every point; those of the dense model move on,
        too."""
        found = self._known(block)
        behind = {(block.index, percent): self._behind_pruned(block, percent, found) for percent in self.points}
        del found
        block.advance(self.learning)
        block.advance(self.dense)
        return behind

    def _known(self, block: Block) -> Known | None:
        """Curvatures of a block's inputs, which serve every point; None for experts, whose are too many at once."""
        if self.row.curvature == "none":
            return [(group, Flat(), self.row) for group in mine(self.dense.deal.ranks, block.groups)]
        if block.family.experts:
            return None
        return list(known(block, self.learning, block.groups, (self.row, {}), {}))

    def _behind_pruned(self, block: Block, percent: int, found: Known | None) -> Stream:
        """The dense stream behind a block pruned to so many percent; the block stays as it is."""
        sizes = {name: shape.numel() for name, shape in self.model.matrices.items()}
        quotas = Quotas({name: round(percent / 100 * size) for name, size in sizes.items()})
        copies = {name: tensor.clone() for name, tensor in block.weights().items()}
        place = self.scratch.hidden(f"cut-{block.path}-{percent}")
        behind = Stream(self.dense.tokens, place, self.dense.calls, self.dense.deal)
        with block.placed(copies):
            # All ranks go the same way: one that prunes no group here has an empty list.
            seen = curvatures(block, self.learning, block.groups, self.row, {}, {}) if found is None else found
            for group, curvature, row in seen:
                prune_group(group, curvature, quotas, row)
                del curvature
            if found is not None:
                share(self.dense.deal.ranks, block.groups)
            for _, after in block.outputs(self.dense):
                behind.hidden.append(after)
        return behind
