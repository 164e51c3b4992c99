"""Pruning the linears of one block in place, by what they see."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.linalg.hessian import Hessian
from slimlm.linalg.ridge import gram_bytes
from slimlm.matrices import matrix
from slimlm.methods.fisher import TokenGradients
from slimlm.methods.inputs import input_statistics
from slimlm.methods.matrix import CHUNK_ELEMENTS, Choice, Known, Task, curvature_of, prune_tall
from slimlm.stream import Stream
from slimlm.walk import StreamedModel

logger = logging.getLogger(__name__)
BY_MAGNITUDE = Choice("none", "magnitude", "none")
GRAM_BYTES = 1 << 30  # of experts' Grams, held at once; another pass of the block for as many more
FEW = 0.25  # tokens an expert must have seen for each of a matrix's inputs, else its statistics say too little
Figures = dict[str, float]  # "<linear> <kind>": a figure for the manifest


def prune_seen(
    model: StreamedModel, index: int, stream: Stream, groups: Iterable[tuple[str, ...]], task: Task, figures: Figures
) -> None:
    """Prune groups of linears of block `index`, its weights loaded, by their inputs in one pass of the stream.

    Linears of a group share their input. An expert that saw too few tokens is pruned by magnitude and recorded.
    """
    for names, curvature in curvatures(model, index, stream, groups, task, figures):
        prune_known(model.blocks[index], model.family.block(index), names, task, curvature)
        del curvature  # before there is the next one


def curvatures(
    model: StreamedModel, index: int, stream: Stream, groups: Iterable[tuple[str, ...]], task: Task, figures: Figures
) -> Iterator[tuple[tuple[str, ...], Known]]:
    """What a pass of the stream says of each group of linears of block `index`, as it is when the first is asked for.

    None for an expert that saw too few tokens, which is recorded.
    """
    gradients = task.gradients(index)
    for few in in_turn(model, index, list(groups)):
        yield from _curvatures(model, index, stream, few, task, gradients, figures)


def prune_known(block: nn.Module, part: str, names: tuple[str, ...], task: Task, curvature: Known) -> None:
    """Prune linears that share their input by what is known of it; by magnitude where that is nothing."""
    if curvature is None:
        prune_by_magnitude(block, part, names, task)
    else:
        prune_together(block, part, names, task, curvature)


def in_turn(model: StreamedModel, index: int, groups: list[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Groups of linears that share an input, in parts whose Grams fit into memory together: all but experts' at once,
    and these some at a time."""
    few: list[tuple[str, ...]] = []
    size = 0
    for names in groups:
        added = gram_bytes(matrix(model.blocks[index], names[0]).shape[1]) if is_expert(model, index, names[0]) else 0
        if few and added and size + added > GRAM_BYTES:
            yield few
            few, size = [], 0
        few.append(names)
        size += added
    if few:
        yield few


def _curvatures(
    model: StreamedModel,
    index: int,
    stream: Stream,
    groups: list[tuple[str, ...]],
    task: Task,
    gradients: Mapping[str, TokenGradients],
    figures: Figures,
) -> Iterator[tuple[tuple[str, ...], Known]]:
    part, block = model.family.block(index), model.blocks[index]
    wanted = [names[0] for names in groups]
    seen = input_statistics(model, index, stream, wanted, norms=task.choice.curvature == "diagonal")
    for names in groups:
        name = f"{part}.{names[0]}"
        statistics = seen.statistics.pop(names[0], None)
        inputs = matrix(block, names[0]).shape[1]
        if is_expert(model, index, names[0]) and seen.tokens.get(names[0], 0) < FEW * inputs:
            figures[f"{name} starved_experts"] = seen.tokens.get(names[0], 0)
            yield names, None
            continue
        assert statistics is not None
        chosen = [gradients[name] for name in names if name in gradients]
        is_gram = statistics.dim() == 2
        quick = task.choice.goes_left_to_right
        curvature = curvature_of(statistics, name, gradients=chosen, upper_only=quick) if is_gram else statistics
        del statistics
        if isinstance(curvature, Hessian):
            figures[f"{name} damping"] = curvature.damping
        yield names, curvature
        del curvature


def is_expert(model: StreamedModel, index: int, name: str) -> bool:
    experts = model.anatomy[index].experts
    return experts is not None and name.startswith(f"{experts.module}.")


def prune_by_magnitude(block: nn.Module, part: str, names: tuple[str, ...], task: Task) -> None:
    """What the largest weights are needs no data."""
    prune_together(block, part, names, Task(BY_MAGNITUDE, task.pattern, task.dtype), None)


def prune_together(block: nn.Module, part: str, names: tuple[str, ...], task: Task, curvature: Known) -> None:
    """Prune linears of a block that read the same input, in place; large ones one after another."""
    weights = [matrix(block, name) for name in names]
    if len(names) > 1 and sum(weight.numel() for weight in weights) > CHUNK_ELEMENTS:
        start = 0
        for name, weight in zip(names, weights, strict=True):
            own = slice(start, start := start + weight.shape[0])
            known = curvature.rows(own) if isinstance(curvature, Hessian) else curvature
            prune_together(block, part, (name,), task, known)
        return
    dtype = torch.float32 if curvature is None or isinstance(curvature, Tensor) else curvature.dtype
    tall = torch.cat([weight.to(dtype) for weight in weights])
    rows = [weight.shape[0] for weight in weights]
    found, _ = prune_tall(tall, rows, task.pattern([f"{part}.{name}" for name in names]), task.choice, curvature)
    for weight, pruned in zip(weights, found.split(rows), strict=True):
        weight.copy_(pruned)


def warn_of_starved(notes: Mapping[str, Any]) -> None:
    """Say that experts were treated by the size of their weights alone, if any were. notes: for the manifest."""
    if starved := notes.get("starved_experts"):
        logger.warning(
            "%d matrices of experts saw too few calibration tokens and were cut by magnitude: they are listed in "
            "slimlm.json under starved_experts; more --num-calibration-samples reach more of them",
            len(starved),
        )


def by_kind(figures: Figures) -> dict[str, dict[str, float | None]]:
    """Figures by kind; those of no kind are strengths of the ridge. JSON has no infinity: that of the ridge is null."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        name, _, kind = key.partition(" ")
        found.setdefault(kind or "ridge", {})[name] = value if math.isfinite(value) else None
    return found
