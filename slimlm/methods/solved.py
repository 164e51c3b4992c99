"""How sparse each block is to be, solved for from measured losses.

Each block alone is pruned to a few sparsities and the rise of the loss on held-out windows measured. What blocks cost
is taken to add up; which of them takes how much is then a knapsack problem, solved by dynamic programming
(`linalg/budget.py`), as in SPDY (Frantar & Alistarh, arXiv 2201.13096), which solves it for speed and with errors of
layers in place of measured losses. No block is pruned further than it was measured, and a rise that is within its
standard error counts as that error.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from slimlm.linalg.budget import LossCurve, cheapest_split
from slimlm.methods.budget import WINDOWS, held_out_windows, measured_curve
from slimlm.methods.matrix import Choice, Known, Pattern, Task
from slimlm.methods.prune_block import curvatures, prune_known, prune_seen
from slimlm.recipe import GRAMS
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work

POINTS = (0.5, 1.0, 1.5, 2.0)  # of the sparsity asked for
MOST = 0.95  # sparse, at most
TOGETHER = 4  # blocks measured in one walk: their pruned streams wait on disk, all points of each
SCRATCH = WINDOWS * (TOGETHER * len(POINTS) + 2)  # windows on disk at once
LEFT_TO_RIGHT = Choice("gram", "columns", "left-to-right")


@torch.no_grad()
def solved_shares(
    model: StreamedModel, sparsity: float, choice: Choice, batches: list[Tensor], work: Work
) -> list[float]:
    """The share of its weights each block loses, sparsity being at most MOST."""
    sizes = [
        sum(model.matrices[f"{model.family.block(index)}.{name}"].numel() for name in anatomy.linears)
        for index, anatomy in enumerate(model.anatomy)
    ]
    curves = _curves(model, sparsity, choice, batches, work)
    return [percent / 100 for percent in cheapest_split(curves, sizes, 100 * sparsity, round(100 * MOST))]


def _curves(
    model: StreamedModel, sparsity: float, choice: Choice, batches: list[Tensor], work: Work
) -> list[LossCurve]:
    """The dense streams go through the model once; the pruned streams of a few blocks at a time on to its end."""
    learn, test = held_out_windows(batches)
    most = round(100 * MOST)
    points = sorted({min(round(100 * sparsity * point), most) for point in POINTS} - {0})
    blocks, tokens = len(model.blocks), len(test[0][0]) - 1
    work.progress.stage("measuring blocks", blocks)
    learning = model.embed(learn, work.scratch("learning", model.device))
    dense = model.embed(test, work.scratch("dense-test", model.device))
    losses: dict[tuple[int, int], Tensor] = {}
    for first in range(0, blocks, TOGETHER):
        cut: dict[tuple[int, int], Stream] = {}
        for index in range(first, blocks):
            with model.block(index):
                for stream in cut.values():
                    model.advance(index, stream)
                if index >= first + TOGETHER:
                    continue
                start = time.perf_counter()
                known = _known(model, index, choice, learning)
                for percent in points:
                    cut[index, percent] = _behind_pruned(model, index, percent, choice, (known, learning), dense, work)
                del known
                model.advance(index, learning)
                model.advance(index, dense)
            work.progress.step()
            work.progress.done("pruned to measure", model.family.block(index), time.perf_counter() - start)
        losses |= {key: model.nll(stream) / tokens for key, stream in cut.items()}
        work.clear_scratch("cut-*")
    before = model.nll(dense) / tokens
    work.clear_scratch()
    behind = [[(percent, losses[index, percent]) for percent in points] for index in range(blocks)]
    return [measured_curve(points_of_block, before) for points_of_block in behind]


def _known(model: StreamedModel, index: int, choice: Choice, learning: Stream) -> dict[tuple[str, ...], Known] | None:
    """Curvatures of the inputs of block `index`, its weights loaded, which serve every point; None for each where none
    is needed, and at all for experts, whose are too many to be held at once."""
    groups = model.anatomy[index].inputs
    if model.anatomy[index].experts and choice.curvature != "none":
        return None
    if choice.curvature == "none":
        return dict.fromkeys(groups)
    return dict(curvatures(model, index, learning, groups, Task(_quick(choice), _nothing), {}))


def _quick(choice: Choice) -> Choice:
    return LEFT_TO_RIGHT if choice.curvature in GRAMS else choice


def _nothing(names: list[str]) -> Pattern:
    return Pattern((0,) * len(names))


def _behind_pruned(
    model: StreamedModel,
    index: int,
    percent: int,
    choice: Choice,
    data: tuple[Mapping[tuple[str, ...], Known] | None, Stream],
    dense: Stream,
    work: Work,
) -> Stream:
    """The dense stream behind block `index`, its weights loaded, once that is pruned; the block stays as it is.

    data: what is known of the block's inputs, or the stream that says it.
    """
    part, (known, learning) = model.family.block(index), data

    def pattern(names: list[str]) -> Pattern:
        return Pattern(tuple(round(percent / 100 * model.matrices[name].numel()) for name in names))

    copies = {name: tensor.clone() for name, tensor in model.weights(index).items()}
    behind = Stream(dense.tokens, work.scratch(f"cut-{part}-{percent}", model.device), dense.calls)
    with model.placed(part, copies) as block:
        task = Task(_quick(choice), pattern)
        for names, curvature in (known or {}).items():
            prune_known(block, part, names, task, curvature)
        if known is None:
            prune_seen(model, index, learning, model.anatomy[index].inputs, task, {})
        for number, hidden in enumerate(dense.hidden):
            behind.hidden.append(model.run(index, hidden, dense.calls[number][index]))
    return behind
