"""Setting single weights to zero, block after block: what data each method's row gets.

Every linear inside the blocks is pruned, experts' too; embeddings, head and routers are not. Each block sees what the
pruned blocks before it pass on, and an expert the tokens that are routed to it. Zeros take as much room as other
numbers: the checkpoint keeps its size, and stock kernels their speed.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.errors import RunFailure
from slimlm.fit.beside_dense import BlockPair
from slimlm.fit.figures import by_kind, warn_of_starved
from slimlm.fit.lm_head import write_fitted_head
from slimlm.fit.pair import Pair
from slimlm.fit.refine import Refiner
from slimlm.linalg.gram import Squares
from slimlm.linalg.regression import learn_and_test
from slimlm.model.block import Block, Group
from slimlm.model.rotation import unchanged
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import backwards, every, to_the_end, untold
from slimlm.prune import allocation, solved
from slimlm.prune.curvature import Curvature, Flat, row_fisher
from slimlm.prune.group import BY_MAGNITUDE, Gradients, Row, curvatures, prune_group
from slimlm.prune.plan import refits_head, reorders, row_of
from slimlm.prune.quota import ALONE, Quotas, whole_tiles
from slimlm.prune.tiles import gathered, reorder
from slimlm.prune.towards_dense import HEAD_RATE, prune_block
from slimlm.recipe import PruneStep
from slimlm.run import Outcome, Run, nothing
from slimlm.statistics.grams import firsts, input_sums
from slimlm.statistics.sweep import Losses, Walks, windows_to_sweep
from slimlm.statistics.token_gradients import Sample, gather_gradients, gradients_of


@torch.no_grad()
def run_prune(run: Run[PruneStep]) -> Outcome:
    """Prune block after block, and write each."""
    recipe, model, row = run.recipe, run.model, row_of(run.recipe)
    run.result.lay_out(run.plan.tensors, run.plan.carrier)
    later = [model.family.final_norm, model.family.head] if recipe.repairs and refits_head(model) else []
    for part in model.outside:
        if part not in later:
            run.result.write(model, part, unchanged(model, part))
    if recipe.needs_gradients:
        _gather_gradients(run)
    counts = _counts(run, row)
    run.scratch.clear()
    if recipe.tile:
        counts = whole_tiles(counts, recipe.tile)
    quotas = Quotas(counts, *recipe.pattern_sizes, recipe.tile or ALONE, recipe.seed)
    notes: dict[str, Any] = {} if recipe.allocation == "uniform" else {"allocation": _shares(model, counts)}
    if row.curvature == "none" or row.sees_fisher:
        notes |= _prune_apart(run, row, quotas)
    elif recipe.repairs:
        notes |= _prune_beside_dense(run, row, quotas)
    else:
        notes |= _prune_seeing(run, row, quotas)
    warn_of_starved(notes)
    run.result.settle()
    return Outcome(run.plan, notes, zeros=run.ranks.decided(lambda: _zeros_written(run)))


def _gather_gradients(run: Run[PruneStep]) -> None:
    """Leave the gradients that the recipe asks for in the journal, unless an earlier process did."""
    recipe, model = run.recipe, run.model
    if all(run.journal.holds(_step(index)) for index in backwards(model)):
        return
    sample = Sample(recipe.fisher_samples, recipe.fisher_unit == "sequence", recipe.seed)
    windows = windows_to_sweep(run.batches, sample.count if sample.by_sequence else None)
    losses = Losses(windows, recipe.seed, recipe.fisher_labels, run.ranks)
    walks = Walks(run.walk("gradients"), run.walk("gradients back", order=backwards(model)), run.scratch)
    for block, tensors in gather_gradients(model, losses, walks, sample):
        run.journal.keep(_step(block.index), tensors, names=sorted(tensors))
        tensors.clear()  # before there are the next


def _step(index: int) -> str:
    return f"gradients-{index}"


def _gathered(run: Run[PruneStep], index: int) -> dict[str, Tensor]:
    """What was gathered of a block, by its number; all ranks ask for it."""
    recalled = run.journal.recall(_step(index))
    if recalled is None:
        path = run.model.family.block(index)
        raise RunFailure(f"the gradients of {path} are gone from {run.journal.directory}: start over")
    return recalled[1]


def _gradients(run: Run[PruneStep], block: Block) -> Gradients:
    """Of a block's linears; of an expert that no token reached, none. All ranks ask for it."""
    return gradients_of(block, _gathered(run, block.index))


def _counts(run: Run[PruneStep], row: Row) -> dict[str, int]:
    """How many weights go of each matrix, by full name."""
    record = run.journal.last("allocation")
    if record:
        return dict(record["counts"])
    recipe, matrices = run.recipe, allocation.Matrices.of(run.model, run.recipe.sparsity)
    counts = matrices.uniform() if recipe.allocation == "uniform" else run.ranks.agreed(_uneven(run, row, matrices))
    run.journal.commit("allocation", counts=counts)
    return counts


def _uneven(run: Run[PruneStep], row: Row, matrices: allocation.Matrices) -> dict[str, int]:
    name = run.recipe.allocation
    matrices.check(str(name), solved.MOST if name == "solved" else 1.0)
    match name:
        case "solved":
            return matrices.by_block(_solved_shares(run, row))
        case "global":
            return allocation.by_threshold(_scored(run, row), matrices, run.ranks)
        case "owl":
            dense = run.embed("dense")
            return allocation.owl(untold(run.walk("allocating")), matrices, partial(_norms, stream=dense))
        case "pq":
            return allocation.pq(_some(run), matrices, run.ranks)
        case _:
            return allocation.alphapruning(_some(run), matrices, run.ranks)


def _some(run: Run[PruneStep]) -> Iterator[Block]:
    """Every block, on one rank or another."""
    for _, block, _ in run.apart("allocating", every(run.model, lambda block: block.index)):
        if block is not None:
            yield from untold([block])


def _scored(run: Run[PruneStep], row: Row) -> Iterator[tuple[Block, allocation.Scores]]:
    """Every block, on one rank or another, and what its weights' going is predicted to cost."""
    known = nothing if row.curvature == "none" else partial(_gathered, run)
    for _, block, found in run.apart("allocating", every(run.model, lambda block: block.index), known):
        if block is not None:
            block.facts = None
            gradients = gradients_of(block, found) if found else {}
            yield block, allocation.global_scores(block, gradients, row, run.recipe.fisher_damping)


def _norms(block: Block, stream: Stream) -> Mapping[str, Tensor]:
    """Of the inputs of a block's linears in the dense model, whose stream goes past it."""
    found = input_sums(block, stream, firsts(block.groups), Squares, onward=True)
    return {name: found[first].norms() for name, first in block.family.first_of.items() if first in found}


def _solved_shares(run: Run[PruneStep], row: Row) -> dict[int, float]:
    learn, test = learn_and_test(run.batches, solved.WINDOWS)
    streams = run.embed("learning", learn), run.embed("dense-test", test)
    measuring = solved.Measuring(run.model, row, run.recipe.sparsity, *streams, run.scratch, test[0].shape[1])
    blocks = run.walk("measuring blocks", order=to_the_end(run.model, solved.TOGETHER))
    return solved.solved_shares(run.model, run.recipe.sparsity, measuring.curves(blocks))


def _shares(model: StreamedModel, counts: dict[str, int]) -> dict[str, float]:
    sizes = model.matrices
    return {name: round(count / sizes[name].numel(), 4) for name, count in counts.items()}


def _prune_apart(run: Run[PruneStep], row: Row, quotas: Quotas) -> dict[str, Any]:
    """Without data, or with gradients of the dense model, blocks do not depend on one another."""
    model = run.model
    left = run.unwritten(every(model, lambda block: block.index), model.family.block)
    for some, block, found in run.apart("pruning", left, partial(_gathered, run) if row.sees_fisher else nothing):
        if block is not None:
            if reorders(run.recipe, row):
                reorder(block)
            gradients = gradients_of(block, found) if found else {}
            for group, curvature, own in _known_apart(run.recipe, block, row, gradients):
                try:
                    prune_group(group, curvature, quotas, own)
                except ValueError as error:
                    raise RunFailure(f"{group.full_names[0]} cannot be pruned: {error}") from error
                del curvature  # before there is the next one
                run.ranks.note("solves")
        run.hand_in(list(map(model.family.block, some)), block.weights().items() if block else ())
    return _without_gradients(run, row)


def _known_apart(
    recipe: PruneStep, block: Block, row: Row, gradients: Gradients
) -> Iterator[tuple[Group, Curvature, Row]]:
    """What there is to prune a block's linears by: nothing, or gradients, which an expert that no token reached has
    not."""
    if row.curvature == "none":
        yield from ((group, Flat(), row) for group in block.groups)
        return
    for group in chain.from_iterable(together.apart() for together in block.groups):
        if group.first in gradients:
            blocks = row.curvature == "block-fisher"
            yield group, row_fisher(gradients[group.first], recipe.fisher_damping, blocks), row
        else:
            yield group, Flat(), BY_MAGNITUDE


def _without_gradients(run: Run[PruneStep], row: Row) -> dict[str, Any]:
    """Experts that no token reached."""
    starved: dict[str, int] = {}
    experts = [group for group in run.model.groups if group.is_expert and row.sees_fisher]
    for block, groups in groupby(experts, key=lambda group: group.block):
        record = run.journal.last(_step(block.index))
        known = record["names"] if record else ()
        starved |= {group.full_names[0]: 0 for group in groups if f"{group.first}.delta" not in known}
    return {"starved_experts": starved} if starved else {}


def _prune_seeing(run: Run[PruneStep], row: Row, quotas: Quotas) -> dict[str, Any]:
    """Statistics of all linears' inputs in one pass over the stream, their pruning, and a pass through what is left."""
    streams = run.streams("calibration", {"pruned": run.model}, run.result.leading(run.model))
    stream = streams["pruned"]
    for block in run.walk("pruning", streams):
        if reorders(run.recipe, row):
            reorder(block, stream)
        known = curvatures(
            block, stream, block.groups, row, _gradients(run, block) if row.sees_both else {}, streams.figures
        )
        for group, curvature, own in known:
            prune_group(group, curvature, quotas, own)
            del curvature  # before there is the next one
        run.result.pass_on(block, stream, run.recipe.dtype)
    return by_kind(streams.figures)


def _prune_beside_dense(run: Run[PruneStep], row: Row, quotas: Quotas) -> dict[str, Any]:
    """Write every block pruned towards the dense one, and the head refitted unless it is tied to the embedding."""
    model = run.model
    eye = torch.eye(model.config.hidden_size, dtype=torch.float32, device=model.device)
    small = model.another(model.checkpoint, copy.deepcopy(model.config))
    streams = run.streams("pruned", {"dense": model, "small": small}, run.result.leading(model))
    refiner = Refiner(run.recipe.refine, run.recipe.seed, keeps_zeros=True)
    pair = Pair(
        model, small, eye, streams, run.scratch.hidden("between"), run.recipe.dtype, judges=bool(refiner.epochs)
    )
    for dense in run.walk("pruning", streams):
        tensors = dense.weights() | (gathered(dense, streams["dense"]) if reorders(run.recipe, row) else {})
        beside = BlockPair(pair, dense, small.blocks[dense.index], tensors)
        prune_block(beside, _gradients(run, dense) if row.sees_both else {}, quotas, row)
        refiner.refine(beside)
        run.result.pass_on(beside.small, streams["small"], run.recipe.dtype, beside.tensors)
        del tensors, beside  # before there is the next block
    notes: dict[str, Any] = by_kind(streams.figures)
    if refits_head(model):
        notes["head"] = write_fitted_head(pair, run.result, run.recipe.seed, run.progress, HEAD_RATE)
    return notes


def _zeros_written(run: Run[PruneStep]) -> float:
    """Share of zeros in the pruned matrices, counted in what is on disk."""
    model = run.model.model
    state = model.state_dict()
    owners = {name: name.rpartition(".")[0] for name in run.model.matrices}
    pruned = {owner if owner in state else f"{name}.weight" for name, owner in owners.items()}
    zeros = total = 0
    for name in checkpoint_tensors(model, {name: state[name] for name in pruned}):
        tensor = run.result.writer.places[name].read()
        zeros += int((tensor == 0).sum())
        total += tensor.numel()
    return zeros / total
