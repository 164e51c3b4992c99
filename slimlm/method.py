"""The contract of a method."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimlm.model.streamed import StreamedModel
from slimlm.prune.group import Row
from slimlm.recipe import Recipe
from slimlm.run import Outcome, Plan, Run


@dataclass(frozen=True)
class Method:
    """plan(model, recipe) does no heavy work and raises UserError for what cannot be done. run(run) lays out and writes
    every tensor once; it may find some of its work done already. Recipes are resolved ones.

    sparsity_of: what a recipe's sparsity is the share of. row: what a pruner chooses and updates by, if it is one.
    calibrates(recipe, path): whether it looks at data, for the model in a directory.
    scratch(recipe, model): windows whose hidden states wait on disk at once while it runs, beside the calibration's.
    holds_out(recipe): whether it chooses something on windows it holds out, and so needs a few.
    gradients(recipe, model): numbers of gradients that are kept beside the result while it runs.
    """

    summary: str
    paper: str
    sparsity_of: Literal["parameters", "weights in pruned matrices"]
    plan: Callable[[StreamedModel, Recipe], Plan]
    run: Callable[[Run], Outcome]
    calibrates: Callable[[Recipe, Path], bool]
    scratch: Callable[[Recipe, StreamedModel], int]
    holds_out: Callable[[Recipe], bool]
    gradients: Callable[[Recipe, StreamedModel], int] = lambda recipe, model: 0
    resolve: Callable[[Recipe], Recipe] = lambda recipe: recipe
    row: Row | None = None
