"""What every method hands to the flow: a plan before any work, an outcome after it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from slimlm.checkpoint.writer import TensorSpec
from slimlm.errors import UserError
from slimlm.recipe import AnyStep, Step
from slimlm.walk import StreamedModel
from slimlm.work import Work

S = TypeVar("S", bound=Step)


@dataclass(frozen=True)
class Plan:
    """The result's config and tensors (names as in its files), its recipe, and what of the config changes.

    carrier: the result's skeleton, which says how its files name and lay out tensors.
    widths: those inside blocks and of the stream, as `--widths` takes them, where they change or may.
    remark: what is still to be decided in the run, and how. files: what else belongs into the checkpoint.
    """

    config: PretrainedConfig
    tensors: dict[str, TensorSpec]
    parameters: int
    recipe: AnyStep
    carrier: PreTrainedModel
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    remark: str | None = None
    widths: str | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a run found out.

    plan: what it carried out, in which widths may have been settled that were still open. notes: figures for the
    manifest. basis(block): [hidden, width], where the stream leaving a block was moved to, if it was. blocks: the dense
    model's blocks that are still there, by number; None for all. zeros: share of zeros in the matrices a method prunes,
    counted on disk; None for one that prunes none.
    """

    plan: Plan
    notes: dict[str, Any] = field(default_factory=dict)
    basis: Callable[[int], Tensor] | None = None
    blocks: tuple[int, ...] | None = None
    zeros: float | None = None


@dataclass(frozen=True)
class Method(Generic[S]):
    """plan(model, recipe) does no heavy work and raises UserError for what cannot be done.
    run(model, plan, batches, work) lays out and writes every tensor once; it may find some of its work done already.

    sparsity_of: what a recipe's sparsity is the share of.
    scratch(recipe, model): windows whose hidden states wait on disk at once while it runs, beside the calibration's.
    calibrates(recipe, path): whether it looks at data, for the model in a directory.
    holds_out(recipe): whether it chooses something on windows it holds out, and so needs a few.
    gradients(recipe, model): numbers of gradients that are kept beside the result while it runs.
    """

    summary: str
    paper: str
    sparsity_of: Literal["parameters", "weights in pruned matrices"]
    calibrates: Callable[[S, Path], bool]
    plan: Callable[[StreamedModel, S], Plan]
    run: Callable[[StreamedModel, Plan, list[Tensor], Work], Outcome]
    scratch: Callable[[S, StreamedModel], int] = lambda recipe, model: 0
    holds_out: Callable[[S], bool] = lambda recipe: False
    gradients: Callable[[S, StreamedModel], int] = lambda recipe, model: 0


def require_declared(model: StreamedModel, verb: str) -> None:
    """Raises UserError naming weights of the model that its family does not declare."""
    unknown = [
        name
        for name in model.model.state_dict()
        if model.family.role(name) is None and name not in model.model.all_tied_weights_keys
    ]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{model.config.model_type!r} has weights slimlm does not know how to {verb}: {unknown[0]}{more} "
            "(a newer transformers may have added them)"
        )
