"""The contract of a method."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal

from slimlm.model.streamed import StreamedModel
from slimlm.prune.group import Row
from slimlm.run import Outcome, Plan, Run, S


@dataclass(frozen=True)
class Method(Generic[S]):
    """plan(model, recipe) does no heavy work and raises UserError for what cannot be done. run(run) lays out and writes
    every tensor once; it may find some of its work done already. Recipes are resolved ones.

    steps: the class of a recipe's steps that are of this method.
    sparsity_of: what a recipe's sparsity is the share of. row: what a pruner chooses and updates by, if it is one.
    calibrates(recipe, path): whether it looks at data, for the model in a directory.
    scratch(recipe, model): windows whose hidden states wait on disk at once while it runs, beside the calibration's.
    holds_out(recipe): whether it chooses something on windows it holds out, and so needs a few.
    kept(recipe, model): bytes, of gradients most often, that lie beside the result while it runs.
    """

    name: str
    summary: str
    paper: str
    steps: type[S]
    sparsity_of: Literal["parameters", "weights in pruned matrices"]
    plan: Callable[[StreamedModel, S], Plan]
    run: Callable[[Run[S]], Outcome]
    calibrates: Callable[[S, Path], bool]
    scratch: Callable[[S, StreamedModel], int]
    holds_out: Callable[[S], bool]
    kept: Callable[[S, StreamedModel], int] = lambda recipe, model: 0
    row: Row | None = None
