"""How sparse each block is to be, solved for from measured losses.

Each block alone is pruned to a few sparsities, all in one pass over the model, and the rise of the loss on held-out
windows measured. What blocks cost is taken to add up; which of them takes how much is then a knapsack problem, solved
by dynamic programming (`linalg/budget.py`), as in SPDY (Frantar & Alistarh, arXiv 2201.13096), which solves it for
speed and with errors of layers in place of measured losses.
"""

import torch

from slimlm.linalg.budget import LossCurve, cheapest_split
from slimlm.methods.budget import held_out_windows
from slimlm.methods.matrix import GRAMS, Choice, Pattern, Task
from slimlm.methods.prune_block import BY_MAGNITUDE, prune_seen, prune_together
from slimlm.stream import Stream
from slimlm.walk import StreamedModel
from slimlm.work import Work

POINTS = (0.5, 1.0, 1.4)  # of the sparsity asked for
MOST = 0.95  # sparse, at most
LEFT_TO_RIGHT = Choice("gram", "columns", "left-to-right")


@torch.no_grad()
def solved_shares(
    model: StreamedModel, sparsity: float, choice: Choice, batches: list[torch.Tensor], work: Work
) -> list[float]:
    """The share of its weights each block loses."""
    sizes = [
        sum(model.matrices[f"{model.family.block(index)}.{name}"].numel() for name in anatomy.linears)
        for index, anatomy in enumerate(model.anatomy)
    ]
    curves = _curves(model, sparsity, choice, batches, work)
    return [percent / 100 for percent in cheapest_split(curves, sizes, 100 * sparsity, round(100 * MOST))]


def _curves(
    model: StreamedModel, sparsity: float, choice: Choice, batches: list[torch.Tensor], work: Work
) -> list[LossCurve]:
    learn, test = held_out_windows(batches)
    points = sorted({min(round(100 * sparsity * point), round(100 * MOST)) for point in POINTS} - {0})
    work.progress.stage("measuring blocks", len(model.blocks))
    learning = model.embed(learn, work.scratch("learning", model.device))
    dense = model.embed(test, work.scratch("dense-test", model.device))
    cut: dict[tuple[int, int], Stream] = {}
    for index in range(len(model.blocks)):
        with model.block(index):
            for stream in cut.values():
                model.advance(index, stream)
            for percent in points:
                cut[index, percent] = _behind_pruned(model, index, percent, choice, learning, dense, work)
            model.advance(index, learning)
            model.advance(index, dense)
        work.progress.step()
    tokens = len(test[0][0]) - 1
    before = float(model.nll(dense).mean()) / tokens
    rises = {key: float(model.nll(stream).mean()) / tokens - before for key, stream in cut.items()}
    work.clear_scratch()
    return [LossCurve([(percent, rises[index, percent]) for percent in points]) for index in range(len(model.blocks))]


def _behind_pruned(
    model: StreamedModel, index: int, percent: int, choice: Choice, learning: Stream, dense: Stream, work: Work
) -> Stream:
    """The dense stream behind block `index`, its weights loaded, once that is pruned; the block stays as it is."""
    part = model.family.block(index)

    def pattern(names: list[str]) -> Pattern:
        return Pattern(tuple(round(percent / 100 * model.matrices[name].numel()) for name in names))

    copies = {name: tensor.clone() for name, tensor in model.weights(index).items()}
    behind = Stream(dense.tokens, work.scratch(f"{part}-{percent}", model.device), dense.calls)
    with model.placed(part, copies) as block:
        if choice.curvature == "none":
            for names in model.anatomy[index].inputs:
                prune_together(block, part, names, Task(BY_MAGNITUDE, pattern), None)
        else:
            quick = LEFT_TO_RIGHT if choice.curvature in GRAMS else choice
            prune_seen(model, index, learning, model.anatomy[index].inputs, Task(quick, pattern), {})
        for number, hidden in enumerate(dense.hidden):
            behind.hidden.append(model.run(index, hidden, dense.calls[number][index]))
    return behind
