"""The basis of the residual stream: an orthonormal [hidden, hidden], most important directions first."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.errors import RunFailure
from slimlm.linalg.gram import Gram, rms_normalise
from slimlm.linalg.pca import felt, leading, principal_basis, with_kept
from slimlm.methods.gradients import TOKENS, gradient_covariance
from slimlm.recipe import RotateStep, SliceStep
from slimlm.stream import hooked
from slimlm.walk import StreamedModel
from slimlm.work import Work

MASSIVE = 20.0  # a token this many times the median root mean square of its batch is a massive activation
MOST_MASSIVE = 16  # directions at most
MASSIVE_ENERGY = 1e-3  # share of the massive tokens' energy from which on a direction is one of theirs


@dataclass(frozen=True)
class Basis:
    """vectors: [hidden, hidden] fp64. influence: [blocks], 1 - cosine between what enters and leaves each block.

    centred: whether the norms subtract the mean; the all-ones direction is then the last.
    """

    vectors: Tensor
    influence: Tensor
    notes: dict[str, Any]
    centred: bool = False

    def of(self, width: int) -> Tensor:
        """For a stream of this width: [hidden, width]."""
        return leading(self.vectors, width, self.centred)


@dataclass
class StreamStatistics:
    """What one pass over the model finds out about its residual stream.

    gram: of the RMS-normalised stream over all norms. massive: the same of massive activations only.
    turned: [blocks], summed 1 - cosine between a block's input and output.
    """

    gram: Gram
    massive: Gram
    turned: Tensor

    def state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.gram.tokens, self.massive.tokens])
        return {"gram": self.gram.matrix, "massive": self.massive.matrix, "counts": counts, "turned": self.turned}

    def load(self, state: dict[str, Tensor]) -> None:
        self.gram.matrix, self.massive.matrix = (
            state[name].to(self.gram.matrix.device) for name in ("gram", "massive")
        )
        self.gram.tokens, self.massive.tokens = state["counts"].tolist()
        self.turned = state["turned"]


def find_basis(model: StreamedModel, recipe: SliceStep | RotateStep, batches: list[Tensor], work: Work) -> Basis:
    """Eigenvectors of the sum over all norms of the Gram of what the readers see, weighed by what the loss feels.

    SliceGPT (arXiv 2401.15024, section 3.2) takes the raw stream, where late blocks and tokens of huge norm decide
    everything; the readers see it normalised. With `weighting: loss` the covariance of the loss's gradient has its
    share: directions that are small but matter then survive. Directions of massive activations (Sun et al., arXiv
    2402.17762) come first: they are so few that no sum over tokens would keep them, and the attention sink rests on
    them.
    """
    recalled = work.journal.recall("basis")
    if recalled:
        record, saved = recalled
        centred = model.family.centred
        return Basis(saved["basis"].to(model.device), saved["influence"], record["notes"], centred)
    found = collect_statistics(model, batches, work)
    matrix = found.gram.matrix
    if recipe.weighting == "loss":
        windows = torch.cat(batches)
        chosen = windows[: max(1, TOKENS // windows.shape[1])].split(len(batches[0]))
        gradients = gradient_covariance(model, list(chosen), recipe.seed, work)
        matrix = felt(matrix, gradients)
    work.progress.stage("finding the basis", 1)
    if not torch.isfinite(matrix + found.massive.matrix).all():
        raise RunFailure(f"the residual stream or its gradients overflow in {model.dtype}: the weights are broken")
    kept = massive_directions(found.massive)
    hidden = model.config.hidden_size
    mean = torch.full((hidden, 1), hidden**-0.5, dtype=torch.float64, device=model.device)
    vectors = with_kept(kept, matrix, mean if model.family.centred else None)
    norms = len(model.blocks) * len(model.family.norms) + 1
    notes: dict[str, Any] = {
        "calibration_tokens_per_norm": found.gram.tokens / norms,
        "massive_activations": {"tokens_per_norm": found.massive.tokens / norms, "directions": kept.shape[1]},
    }
    influence = found.turned / (found.gram.tokens / norms)
    work.journal.keep("basis", {"basis": vectors, "influence": influence}, notes=notes)
    return Basis(vectors, influence, notes, model.family.centred)


def massive_directions(massive: Gram) -> Tensor:
    """Orthonormal directions that massive activations lie in: [hidden, 0 to MOST_MASSIVE]."""
    if not massive.tokens:
        return massive.matrix[:, :0]
    vectors, energies = principal_basis(massive.matrix)
    count = int((energies > MASSIVE_ENERGY * energies.sum()).sum())
    return vectors[:, : min(count, MOST_MASSIVE)]


@torch.no_grad()
def collect_statistics(model: StreamedModel, batches: list[Tensor], work: Work, norms: bool = True) -> StreamStatistics:
    """One pass over the model: everything about its stream that a basis and a choice of blocks need.

    norms: whether what enters the blocks' norms is looked at, or only what leaves the last block.
    """
    normalise = partial(rms_normalise, eps=model.norm_eps, centred=model.family.centred)
    hidden = model.config.hidden_size
    found = StreamStatistics(
        Gram(hidden, model.device), Gram(hidden, model.device), torch.zeros(len(model.blocks), dtype=torch.float64)
    )
    work.progress.stage("calibrating", len(model.blocks))
    name = "calibration" if norms else "influence"
    streams, state, first = work.start_streams(name, {"dense": (model, batches)})
    stream = streams["dense"]
    if state:
        found.load(state)
        work.progress.step(first)

    def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        _add(found, args[0], normalise)

    for index in range(first, len(model.blocks)):
        start = time.perf_counter()

        def watch(before: Tensor, after: Tensor, index: int = index) -> None:
            found.turned[index] += float((1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)).sum())

        with (
            model.block(index) as block,
            hooked((block.get_submodule(norm.name), observe) for norm in model.anatomy[index].norms if norms),
        ):
            model.advance(index, stream, watch)
        work.save_streams(name, index, streams, found.state())
        work.progress.step()
        work.progress.done("calibrated", model.family.block(index), time.perf_counter() - start)
    for hidden_states in stream.hidden:
        _add(found, hidden_states, normalise)
    return found


def find_influence(model: StreamedModel, batches: list[Tensor], work: Work) -> Basis:
    """For a stream that stays in its own basis: how much each block changes it."""
    recalled = work.journal.recall("influence")
    if recalled:
        influence = recalled[1]["influence"]
    else:
        found = collect_statistics(model, batches, work, norms=False)
        influence = found.turned / found.gram.tokens
        work.journal.keep("influence", {"influence": influence})
    eye = torch.eye(model.config.hidden_size, dtype=torch.float64, device=model.device)
    return Basis(eye, influence, {"basis": "the stream's own"})


def _add(found: StreamStatistics, x: Tensor, normalise: Callable[[Tensor], Tensor]) -> None:
    x = x.flatten(0, -2)
    normalised = normalise(x)
    found.gram.add(normalised)
    size = x.float().square().mean(-1).sqrt()
    massive = size > MASSIVE * size.median()
    if massive.any():
        found.massive.add(normalised[massive])
