"""What a model is: what was done to it, or the widths it can have; and what each matrix looks like to a pruner."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from slimlm.calibration import load_windows, require_known, say_if_few
from slimlm.checkpoint.card import tried_in
from slimlm.checkpoint.hub import Access
from slimlm.checkpoint.manifest import MANIFEST_NAME, Manifest, Measured, Sizes, Sparsity, read_manifest, steps_in
from slimlm.checkpoint.resolve import ResolvedModel
from slimlm.checkpoint.skeleton import load_tokenizer, parameter_count
from slimlm.device import check_process, pick_device
from slimlm.display import usual
from slimlm.errors import RunFailure, UserError, out_of_memory, require_at_least
from slimlm.linalg.allocation import outlier_ratio, pq_index, pq_share, spectrum, tail_exponent
from slimlm.linalg.finite import all_finite
from slimlm.linalg.gram import Gram
from slimlm.linalg.hessian import SingularCurvature, hessian
from slimlm.model.ends import embed
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import untold, walk
from slimlm.models import open_model, resolve_known
from slimlm.progress import Progress
from slimlm.settings import InspectSettings, by_name
from slimlm.shown import Shown
from slimlm.slice.candidates import Choice, choice_at
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout
from slimlm.statistics.grams import firsts, input_sums

SPARSITIES = (0.25, 0.5, 0.75)
SLICED = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)  # shares of the parameters


@dataclass(frozen=True)
class ModelFacts:
    """A model as it is, with bytes of its weights and the dtype of most; mlp and groups are 0 where slicing knows
    none."""

    name: str
    path: str
    model_type: str
    parameters: int
    bytes: int
    dtype: str
    hidden: int
    mlp: int
    groups: int
    blocks: int


class Done(TypedDict):
    """What slimlm.json says was done to a model, and lost by it. steps: in words. tried_in: where such a one loads."""

    made_of: str
    steps: list[str]
    sparsity: Sparsity
    changes: dict[str, list[Any]]
    parameters: Sizes
    bytes: Sizes
    measured: Measured | None
    needs_remote_code: bool
    tried_in: str


@dataclass(frozen=True)
class MatrixFigures:
    """One matrix inside a block.

    zeros: share of weights that are zero. pq: PQ Index of those that are not; pq_with_zeros: of all. prunable: the
    share of all that the first says can go, zeros included. alpha: exponent of the spectrum's tail. stable_rank: sum of
    squared singular values over the largest. outliers: share of |w| ||x|| above 5 times their mean. predicted: for each
    of SPARSITIES, the share of the output's energy lost when that many of the weights with the smallest second-order
    scores go, each made up for as if alone. The last two need data.
    """

    name: str
    shape: tuple[int, int]
    zeros: float
    pq: float
    pq_with_zeros: float
    prunable: float
    alpha: float
    stable_rank: float
    outliers: float | None = None
    predicted: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Inspection(Shown):
    """A model; what was done to it, if slimlm did; where it is dense, the widths that each of SLICED can come to; and
    its matrices."""

    model: ModelFacts
    result: Done | None
    widths: tuple[Choice, ...]
    matrices: tuple[MatrixFigures, ...]

    def describe(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@by_name(InspectSettings)
@out_of_memory("lower --window, or inspect without --dataset")
@torch.no_grad()
def inspect_model(settings: InspectSettings) -> Inspection:
    """What a model is, and figures of every linear inside the blocks, in the order of the model; one block is in memory
    at a time.

    token, cache_dir: for a model on the hub, as `from_pretrained` takes them. Raises UserError for a model or data that
    cannot be used, RunFailure for NaN.
    """
    progress, trust = usual(settings.progress), settings.trust_remote_code
    check_process()
    require_at_least(1, windows=settings.windows)
    require_at_least(2, window=settings.window)
    resolved = resolve_known(settings.model, settings.revision, trust, Access(settings.token, settings.cache_dir))
    manifest = read_manifest(resolved.path)
    done = _done(manifest, resolved.path) if manifest else None
    model = open_model(resolved.path, pick_device(settings.device), "fast", trust)
    progress.line(f"model: {resolved}")
    shapes = Shapes(Layout(model))
    is_whole = {step["method"] for step in steps_in(manifest)} <= {"rotate"}
    widths = _choices(shapes, progress) if is_whole else ()
    return Inspection(_facts(resolved, shapes), done, widths, tuple(_matrices(model, settings, progress)))


def _facts(resolved: ResolvedModel, shapes: Shapes) -> ModelFacts:
    checkpoint, dense = shapes.model.checkpoint, shapes.dense
    return ModelFacts(
        resolved.name,
        str(resolved.path),
        shapes.model.config.model_type,
        parameter_count(shapes.model.model),
        checkpoint.bytes_on_disk(),
        str(checkpoint.main_dtype).removeprefix("torch."),
        dense.hidden,
        dense.mlp,
        dense.groups,
        len(dense.blocks),
    )


def _choices(shapes: Shapes, progress: Progress) -> tuple[Choice, ...]:
    """None of a model with weights that slicing does not know."""
    progress.stage("finding widths", len(SLICED))
    found = []
    for share in SLICED:
        try:
            found.append(choice_at(shapes, share))
        except UserError:
            return ()
        progress.step()
    return tuple(found)


def _done(manifest: Manifest, path: Path) -> Done:
    """Raises UserError for a manifest that says less than slimlm writes."""
    try:
        return {
            "made_of": manifest["model"]["name"],
            "steps": [_described(step) for step in steps_in(manifest)],
            "sparsity": manifest["sparsity"],
            "changes": manifest["changes"],
            "parameters": manifest["parameters"],
            "bytes": manifest["bytes"],
            "measured": manifest["measured"],
            "needs_remote_code": manifest["needs_remote_code"],
            "tried_in": tried_in(manifest),
        }
    except KeyError as error:
        raise UserError(f"{path / MANIFEST_NAME} is not one that this slimlm wrote: it lacks {error}") from error


def _described(step: dict[str, Any]) -> str:
    """A step of a manifest, in words."""
    said = (f"{name} {step[name]}" for name in ("sparsity", "latency", "widths", "pattern", "tokens") if step.get(name))
    return ", ".join([step["method"], *said])


def _matrices(model: StreamedModel, settings: InspectSettings, progress: Progress) -> list[MatrixFigures]:
    """One block is in memory at a time."""
    stream = None
    if settings.dataset is not None:
        tokenizer = load_tokenizer(model.checkpoint.path, settings.trust_remote_code)
        windows = load_windows(settings.dataset, tokenizer, settings.windows, settings.window, settings.seed)
        say_if_few(windows, settings.windows)
        require_known(windows.tokens, model.config.vocab_size, f"data {settings.dataset!r}")
        stream = embed(model, windows.batches(8))
    found: list[MatrixFigures] = []
    for block in untold(walk(model, progress, "inspecting")):
        grams = input_sums(block, stream, firsts(block.groups), Gram, onward=True) if stream else {}
        for group in block.groups:
            gram = grams[group.first].matrix if group.first in grams else None
            for name, weight in zip(group.full_names, group.matrices, strict=True):
                found.append(figures_of(name, weight.float(), gram))
    return found


def figures_of(name: str, weight: Tensor, gram: Tensor | None = None) -> MatrixFigures:
    """weight: [out, in]; gram: [in, in] of its inputs. Raises RunFailure on NaN."""
    if not all_finite(weight):
        raise RunFailure(f"{name}.weight holds NaN or Inf")
    energies = spectrum(weight)
    outliers, predicted = None, None
    if gram is not None:
        outliers = outlier_ratio(weight.abs() * gram.diagonal().sqrt().float())
        predicted = predicted_losses(name, weight.to(gram), gram)
    return MatrixFigures(
        name,
        (weight.shape[0], weight.shape[1]),
        float((weight == 0).double().mean()),
        pq_index(weight),
        pq_index(weight, with_zeros=True),
        1 - pq_share(weight),
        tail_exponent(energies),
        float(energies.sum() / energies[0].clamp_min(1e-300)),
        outliers,
        predicted,
    )


def predicted_losses(name: str, weight: Tensor, gram: Tensor) -> tuple[float, ...]:
    """Summed OBS scores w^2 / [H^-1] of the weights that go, over the energy of the outputs, for each of SPARSITIES.

    weight: [out, in]; gram: [in, in]. Raises RunFailure for a gram that is singular.
    """
    energy = float(((weight @ gram) * weight).sum().clamp_min(1e-300))
    try:
        curvature = hessian(gram.clone())  # readers share it
    except SingularCurvature as error:
        raise RunFailure(f"{name}: {error}") from error
    scores = (weight.square() / curvature.diagonal()).flatten().sort().values.cumsum(0)
    places = [max(0, round(sparsity * weight.numel()) - 1) for sparsity in SPARSITIES]
    return tuple(float(scores[place]) / energy for place in places)
