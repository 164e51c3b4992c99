"""Slicing with one basis for the whole model (after SliceGPT, arXiv 2401.15024).

SliceGPT gives every block its own PCA basis and pays for it with two dense shortcuts per block that no stock class
has. With one orthonormal basis S: [hidden, width] for the whole residual stream the shortcuts are S^T S = I: the result
is the same architecture with smaller widths. What is removed is spent over all of them (`curves.py`), and the weights
are refitted to what the sliced stream brings them (`refit.py`).
"""

import copy
from typing import Any

import torch
from torch import Tensor

from slimlm.checkpoint.reader import Checkpoint
from slimlm.errors import RunFailure
from slimlm.fit.figures import by_kind, warn_of_starved
from slimlm.fit.lm_head import fits_head, write_fitted_head
from slimlm.fit.pair import Pair
from slimlm.fit.refine import Refiner
from slimlm.linalg.regression import learn_and_test
from slimlm.model.block import Block
from slimlm.model.rotation import head_map, slice_block, slice_embedding, unchanged, write_head, write_tied_norm
from slimlm.model.walk import backwards, leading, places
from slimlm.recipe import RotateStep, SliceStep
from slimlm.run import Outcome, Plan, Run
from slimlm.slice import curves
from slimlm.slice.basis import Basis, StreamStatistics, basis_from, collected, own_basis
from slimlm.slice.candidates import splits_for
from slimlm.slice.config import plan_widths
from slimlm.slice.decoding import TIMES, Decoding
from slimlm.slice.per_block import Slicer, basis_of, embedding_gram, embedding_rows, head_of
from slimlm.slice.plan import rotated_influence
from slimlm.slice.refit import Refit
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout, Widths
from slimlm.statistics.sweep import Losses, Walks, gradient_covariance, windows_to_sweep

Slicing = Run[SliceStep] | Run[RotateStep]


@torch.no_grad()
def run_slice(run: Run[SliceStep]) -> Outcome:
    """Find the basis in one pass over the blocks, settle the widths, and write the blocks in a last one."""
    if run.recipe.basis == "per-block":
        return _run_per_block(run)
    model, shapes = run.model, Shapes(Layout(run.model))
    layout, splits = shapes.layout, splits_for(shapes, run.recipe)
    if model.times and not run.journal.last(TIMES):
        run.journal.commit(TIMES, times=model.times.described())  # whoever resumes must come to the same splits
    found = _basis(run, layout, splits)
    widths, notes = _settle(run, layout, splits, found)
    plan = plan_widths(shapes, widths, run.recipe.dtype)
    for name, (before, after) in plan.changes.items():
        run.progress.line(f"{name}: {before} -> {after}")
    eye = torch.eye(widths.hidden, dtype=torch.float32, device=model.device)
    basis = eye if layout.stays(widths) else found.of(widths.hidden).float()
    notes = {**found.notes, **notes}
    if uneven := layout.uneven(widths):
        notes["uneven"] = uneven
    if run.recipe.latency is not None:
        notes["latency"] = Decoding(shapes).described(widths)
    del found  # larger than what is kept of it
    run.result.lay_out(plan.tensors, plan.carrier)
    if run.recipe.refit:
        notes["refit"] = _refit(run, layout, widths, plan, basis)
    else:
        _rotate(run, layout, widths, basis)
    run.result.settle()
    kept = widths.blocks if len(widths.blocks) < len(model.blocks) else None
    return Outcome(plan, {**notes, "widths": str(widths)}, basis, kept)


@torch.no_grad()
def run_rotate(run: Run[RotateStep]) -> Outcome:
    """Find the basis and write every tensor in it."""
    found, layout = _new_basis(run), Layout(run.model, turns=True)
    basis = found.of(layout.dense.hidden).float()
    run.result.lay_out(run.plan.tensors, run.plan.carrier)
    _rotate(run, layout, layout.dense, basis)
    run.result.settle()
    return Outcome(run.plan, {**found.notes, "influence": found.influence.tolist()}, basis)


def _basis(run: Run[SliceStep], layout: Layout, splits: list[Widths]) -> Basis:
    """To choose widths with; the stream's own where none of the splits moves it."""
    model = run.model
    influence = rotated_influence(model.checkpoint.path)
    if influence is not None:
        known = torch.tensor(influence, dtype=torch.float64)
        return own_basis(model, known, "the checkpoint's own, as `slimlm rotate` left it", model.family.centred)
    if not all(map(layout.stays, splits)):
        return _new_basis(run)
    recalled = run.journal.recall("influence")
    if recalled:
        return own_basis(model, recalled[1]["influence"], "the stream's own")
    found = _statistics(run, "influence", norms=False)
    turned = found.turned / found.gram.tokens
    run.journal.keep("influence", {"influence": turned})
    return own_basis(model, turned, "the stream's own")


def _new_basis(run: Slicing) -> Basis:
    model, centred = run.model, run.model.family.centred
    recalled = run.journal.recall("basis")
    if recalled:
        record, saved = recalled
        return Basis(saved["basis"].to(model.device), saved["influence"], record["notes"], centred)
    statistics, gradients = _statistics(run, "calibration"), None
    if run.recipe.weighting == "loss":
        losses = Losses(windows_to_sweep(run.batches), run.recipe.seed, ranks=run.ranks)
        walks = Walks(run.walk("gradients"), run.walk("gradients back", order=backwards(model)), run.scratch)
        gradients = gradient_covariance(model, losses, walks)
    run.progress.stage("finding the basis", 1)
    try:
        found = basis_from(model, statistics, gradients)
    except ValueError as error:
        raise RunFailure(
            f"the residual stream or its gradients overflow in {model.dtype}: the weights are broken"
        ) from error
    run.ranks.share([found.vectors, found.influence])  # other processors might round otherwise
    run.journal.keep("basis", {"basis": found.vectors, "influence": found.influence}, notes=found.notes)
    return found


def _statistics(run: Slicing, name: str, norms: bool = True) -> StreamStatistics:
    streams = run.streams(name, {"dense": run.model})
    return collected(run.model, run.walk("calibrating", streams), streams, norms)


def _settle(run: Run[SliceStep], layout: Layout, splits: list[Widths], found: Basis) -> tuple[Widths, dict[str, Any]]:
    """The widths, and the figures they were chosen by."""
    record = run.journal.last("widths")
    if record:
        return Widths(**{**record["widths"], "blocks": tuple(record["widths"]["blocks"])}), record["notes"]
    widths, notes = curves.with_best_blocks(splits[0], found), dict[str, Any]()
    if len(splits) > 1:
        measured = _curves(run, layout, splits, found)
        widths, notes = curves.choose(
            layout, splits, found, curves.after_refit(measured) if run.recipe.refit else measured
        )
    widths, notes = run.ranks.agreed((widths, notes))
    run.journal.commit("widths", widths=vars(widths), notes=notes)
    return widths, notes


def _curves(run: Run[SliceStep], layout: Layout, splits: list[Widths], found: Basis) -> curves.Curves:
    learn, test = learn_and_test(run.batches, curves.WINDOWS)
    learning = run.embed("learning", learn)
    dense = run.embed("cut-None", test)
    cut = {None: dense} | {cut: run.again(f"cut-{cut}", dense) for cut in curves.cuts_of(layout, splits)}
    measured = curves.CutStreams(layout, found, learning, cut, test[0].shape[1]).curves(run.walk("measuring widths"))
    run.scratch.clear()
    return measured


def _refit(run: Run[SliceStep], layout: Layout, widths: Widths, plan: Plan, basis: Tensor) -> dict[str, Any]:
    """Write all parts refitted; figures for the manifest."""
    model, result = run.model, run.result
    _write_outer(run, layout, widths, basis)
    pair, notes = _refit_blocks(run, layout, widths, plan, basis), dict[str, Any]()
    head = model.family.head
    if layout.keeps_tie(widths):
        result.write(model, head, write_tied_norm(model, basis))
    elif not fits_head(model):
        result.write(model, head, write_head(model, head_map(model, basis), basis))
    else:
        notes["head"] = write_fitted_head(pair, result, run.recipe.seed, run.progress)
    notes |= by_kind(pair.streams.figures)
    warn_of_starved(notes)
    return notes


def _refit_blocks(run: Run[SliceStep], layout: Layout, widths: Widths, plan: Plan, basis: Tensor) -> Pair:
    """Write every block of the compressed model; the streams end behind the last one."""
    model, result = run.model, run.result
    result.settle()  # the compressed model is read from where it is written
    run.ranks.meet()
    config = copy.deepcopy(plan.config)  # building a model sets its dtype
    small = model.another(Checkpoint(result.output), config)
    becomes = {index: small.blocks[place] for index, place in places(widths.blocks).items()}

    def is_whole(block: Block) -> bool:
        return block.index not in becomes or result.written(becomes[block.index].path)

    streams = run.streams("refit", {"dense": model, "small": small}, leading(model, is_whole))
    refiner = Refiner(run.recipe.refine, run.recipe.seed)
    pair = Pair(
        model, small, basis.to(model.device), streams, run.scratch.hidden("between"), judges=bool(refiner.epochs)
    )
    refit = Refit(layout, widths, pair, refiner)
    for dense in run.walk("refitting", streams):
        if dense.index in becomes:
            block = becomes[dense.index]
            result.pass_on(block, streams["small"], tensors=refit.block(dense, block))
        else:
            dense.advance(streams["dense"])
    return pair


def _rotate(run: Slicing, layout: Layout, widths: Widths, basis: Tensor) -> None:
    """Write every tensor of the model in the basis: [hidden, width], and nothing more."""
    model, result = run.model, run.result
    _write_outer(run, layout, widths, basis)
    path = {index: model.family.block(place) for index, place in places(widths.blocks).items()}
    for some, block, _ in run.apart("slicing", run.unwritten(widths.blocks, path.__getitem__)):
        sliced = slice_block(block.weights(), block.family, basis, layout.zeros(widths)) if block else ()
        run.hand_in([path[index] for index in some], sliced)
    tied = layout.keeps_tie(widths)
    tensors = write_tied_norm(model, basis) if tied else write_head(model, head_map(model, basis), basis)
    result.write(model, model.family.head, tensors)


def _write_outer(run: Slicing, layout: Layout, widths: Widths, basis: Tensor) -> None:
    """The embeddings, and what is neither in a block nor touches the stream that moves."""
    model, norm = run.model, run.model.family.embedding_norm
    for name in model.family.embeddings:
        run.result.write(model, name, slice_embedding(model, name, basis, widths.tied))
    kept = model.family.outer if layout.folds(widths) else (*model.family.outer, norm)
    for name in model.outside:
        if name in kept:
            run.result.write(model, name, unchanged(model, name))


def _run_per_block(run: Run[SliceStep]) -> Outcome:
    """Slice block after block in bases of their own (`per_block.py`); each sees what the sliced blocks before it pass
    on."""
    model, result, config = run.model, run.result, copy.deepcopy(run.plan.config)
    family, width = model.family, config.stream_widths[0]
    result.lay_out(run.plan.tensors, run.plan.carrier)
    basis = _embedding_basis(run)[:, :width].contiguous()
    for embedding in family.embeddings:
        result.write(model, embedding, [(f"{embedding}.weight", embedding_rows(model, embedding, basis))])
    result.settle()
    run.ranks.meet()
    small = model.another(Checkpoint(result.output), config)
    streams = run.streams("sliced", {"sliced": small}, result.leading(model))
    basis = streams.state["basis"].to(model.device) if streams.state else basis
    for dense in run.walk("slicing", streams):
        block = small.blocks[dense.index]
        tensors, basis = Slicer(block, streams["sliced"]).slice(dense, basis)
        dense.unload()
        result.pass_on(block, streams["sliced"], tensors=tensors)
        run.journal.keep(f"basis {dense.index}", {"basis": basis})
        streams.state = {"basis": basis}
        del tensors  # before there is the next block
    result.write(model, family.head, head_of(model, basis))
    result.settle()
    notes = {"widths": f"stream={width}", "basis": "per-block"}
    return Outcome(run.plan, notes, lambda index: _basis_after(run, index).to(model.device))


def _embedding_basis(run: Run[SliceStep]) -> Tensor:
    """[hidden, hidden], of what enters the first block."""
    recalled = run.journal.recall("basis")
    if recalled:
        return recalled[1]["basis"].to(run.model.device)
    gram = embedding_gram(run.model, run.embed("embedded"))
    basis = run.ranks.once(basis_of(gram) if run.ranks.first else None)
    run.scratch.clear()
    run.journal.keep("basis", {"basis": basis})
    return basis


def _basis_after(run: Run[SliceStep], index: int) -> Tensor:
    recalled = run.journal.recall(f"basis {index}")
    if recalled is None:
        raise RunFailure(f"{run.journal.directory} lost the basis after block {index}: start over without --resume")
    return recalled[1]["basis"]
