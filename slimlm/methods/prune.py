"""Setting single weights to zero without touching the others.

magnitude (Han et al., arXiv 1506.02626): the smallest |w| of each matrix.
wanda (Sun et al., arXiv 2306.11695, eq. 1): the smallest |w_ij| * ||x_j|| of each row, with ||x_j|| the norm of input j
over the calibration tokens, taken from activations of the model as pruned so far.

Every linear inside the blocks is pruned; embeddings and head are not. Zeros take as much room as other numbers: the
checkpoint keeps its size, and stock kernels their speed.
"""

import copy
import time
from collections.abc import Iterator
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor, nn

from slimlm.checkpoint.hf_internals import checkpoint_tensors
from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import RunFailure, UserError
from slimlm.families import Family
from slimlm.linalg.masks import smallest, smallest_per_group, smallest_per_row, spread
from slimlm.methods.plan import Method, Outcome, Plan
from slimlm.recipe import Recipe
from slimlm.stream import Stream, hooked
from slimlm.walk import StreamedModel
from slimlm.work import Rows, Work


def plan_prune(model: StreamedModel, recipe: Recipe) -> Plan:
    """The same tensors, some of whose numbers will be zero. Raises UserError for a pattern no matrix has room for."""
    for flag, value in (("--round-to", recipe.round_to), ("--widths", recipe.widths)):
        if value:
            raise UserError(f"{flag} is for methods that change widths; pruning keeps them")
    named = {name: tensor for name, tensor in model.model.state_dict().items() if name not in _tied(model)}
    for name, tensor in named.items():
        if model.family.role(name) is None:
            raise UserError(f"{model.config.model_type!r} has a weight slimlm does not know how to prune: {name}")
        if recipe.pattern and _is_pruned(model.family, name) and tensor.shape[1] % recipe.pattern_sizes[1]:
            raise UserError(f"{name} has {tensor.shape[1]} inputs, which pattern {recipe.pattern} does not divide")
    tensors = {
        name: TensorSpec(tuple(tensor.shape), model.stored_dtype(name, recipe.dtype))
        for name, tensor in checkpoint_tensors(model.model, named).items()
    }
    config = copy.deepcopy(model.config)
    config.dtype = next(iter(tensors.values())).dtype
    parameters = sum(torch.Size(spec.shape).numel() for spec in tensors.values())
    return Plan(config, tensors, parameters, recipe)


def _tied(model: StreamedModel) -> set[str]:
    return set(model.model.all_tied_weights_keys)


def _is_pruned(family: Family, name: str) -> bool:
    return family.role(name) in ("reader", "writer") and name.endswith(".weight")


@torch.no_grad()
def run_prune(model: StreamedModel, plan: Plan, batches: list[Tensor], work: Work, by_activation: bool) -> Outcome:
    """Prune block after block; with activations, each block sees what the pruned blocks before it pass on."""
    work.lay_out(plan.tensors)
    for part in model.outside:
        if not work.written(part):
            work.write(model, part, _unchanged(model, part))
    work.progress.stage("pruning", len(model.blocks))
    stream, first = None, 0
    if by_activation:
        whole = list(takewhile(work.written, (model.family.block(index) for index in range(len(model.blocks)))))
        streams, _, first = work.start_streams("calibration", {"pruned": (model, batches)}, len(whole))
        stream = streams["pruned"]
        work.progress.step(first)
    for index in range(first, len(model.blocks)):
        start, part = time.perf_counter(), model.family.block(index)
        if stream is None and work.written(part):
            work.progress.step()
            continue
        with model.block(index) as block:
            norms = {} if stream is None else _input_norms(model, index, stream, block)
            for name, linear in _linears(block, model.family):
                prune_matrix(linear.get_parameter("weight"), norms.get(name), plan.recipe)
            if not work.written(part):
                work.write(model, part, ((f"{part}.{name}", value) for name, value in block.named_parameters()))
            if stream is not None:
                model.advance(index, stream)
                work.save_streams("calibration", index, {"pruned": stream}, {})
        work.progress.step()
        work.progress.done("pruned", part, time.perf_counter() - start)
    work.settle()
    return Outcome(plan, zeros=_zeros_written(model, work))


def prune_matrix(weight: Tensor, input_norms: Tensor | None, recipe: Recipe) -> None:
    """Set the share `recipe.sparsity` of weight: [out, in] to zero, in place, exactly (rounded to whole weights).

    Scores are |w|, times input_norms: [in] where there are any. They compete within groups of a pattern; else within
    the matrix, or within rows once inputs are weighed, since rows then differ in scale for no reason of their own.
    """
    scores = weight.abs().float()
    total = round(recipe.sparsity * weight.numel())
    if input_norms is not None:
        scores *= input_norms
    if recipe.pattern:
        pruned = smallest_per_group(scores, *recipe.pattern_sizes)
    elif input_norms is None:
        pruned = smallest(scores, total)
    else:
        pruned = smallest_per_row(scores, spread(total, weight.shape[0]))
    weight.masked_fill_(pruned, 0)


def _linears(block: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    return [(name, block.get_submodule(name)) for name in (*family.readers, *family.writers)]


def _input_norms(model: StreamedModel, index: int, stream: Stream, block: nn.Module) -> dict[str, Tensor]:
    """For each linear of a block, the norm of every input over the stream's tokens: [in]. Raises RunFailure on NaN."""
    sums: dict[str, Tensor] = {}

    def observe(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        squares = args[0].double().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    with hooked((linear, partial(observe, name=name)) for name, linear in _linears(block, model.family)):
        model.observe(index, stream)
    for name, value in sums.items():
        if not torch.isfinite(value).all():
            raise RunFailure(f"inputs of {model.family.block(index)}.{name} hold NaN or Inf")
    return {name: value.sqrt().float() for name, value in sums.items()}


def _unchanged(model: StreamedModel, part: str) -> Iterator[tuple[str, Rows]]:
    for name, _ in model.model.get_submodule(part).named_parameters():
        if f"{part}.{name}" not in _tied(model):
            yield f"{part}.{name}", model.chunks(f"{part}.{name}")


def _zeros_written(model: StreamedModel, work: Work) -> float:
    """Share of zeros in the pruned matrices, counted in what is on disk."""
    zeros = total = 0
    for name, place in work.writer.places.items():
        if _is_pruned(model.family, name):
            tensor = place.read()
            zeros += int((tensor == 0).sum())
            total += tensor.numel()
    return zeros / total


MAGNITUDE = Method(
    summary="set the smallest weights of each matrix to zero",
    paper="https://arxiv.org/abs/1506.02626",
    sparsity_of="weights in pruned matrices",
    calibrates=lambda recipe, path: False,
    plan=plan_prune,
    run=partial(run_prune, by_activation=False),
)
WANDA = Method(
    summary="set the weights to zero that are smallest times the norm of their input, row by row",
    paper="https://arxiv.org/abs/2306.11695",
    sparsity_of="weights in pruned matrices",
    calibrates=lambda recipe, path: True,
    plan=plan_prune,
    run=partial(run_prune, by_activation=True),
)
