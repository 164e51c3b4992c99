"""Perplexity of a model larger than memory: one block at a time, the same number as of the whole model."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimlm.device import available_memory, return_memory_at_once
from slimlm.evaluation.found import Found
from slimlm.evaluation.tokens import Figures, streamed_figures
from slimlm.families import FAMILIES
from slimlm.model.ends import embed
from slimlm.model.hidden import HiddenStates, Scratch
from slimlm.model.stream import Stream
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import walk
from slimlm.progress import Progress
from slimlm.ranks import Ranks
from slimlm.settings import EvalSettings

HEADROOM = 1.1  # of a model's weights, for what is computed beside them


def is_streamable(model: Found, settings: EvalSettings) -> bool:
    """Whether a model can be measured one block at a time."""
    return model.config.model_type in FAMILIES and not settings.device_map


def has_no_room(models: Sequence[Found], ranks: Ranks, logits: int = 0) -> bool:
    """Whether some rank has too little memory for all of these models at once, and for so many logits of each."""
    place = ranks.host, str(ranks.device)
    size = sum(one.bytes + logits * one.dtype.itemsize for one in models)
    wanted = HEADROOM * ranks.gather(place).count(place) * size
    room = available_memory(ranks.device)
    return any(ranks.gather(wanted > room.get("gpu", room["host"])))


def measure_by_block(
    models: Sequence[Found],
    windows: Tensor,
    settings: EvalSettings,
    batch_size: int,
    ranks: Ranks,
    progress: Progress,
) -> Figures:
    """Figures of windows: [n, time], of a model or of one beside the dense one. Hidden states wait in temporary files.

    Raises UserError for a family that slimlm does not know, RunFailure when a number is not finite or a disk is full.
    """
    return_memory_at_once()
    with tempfile.TemporaryDirectory(prefix="slimlm-") as place, Scratch(Path(place), ranks.device) as scratch:
        done = [
            _advanced(one, windows.split(batch_size), settings, scratch.hidden(name), ranks, progress)
            for one, name in zip(models, ("compressed", "dense"), strict=False)
        ]
        return streamed_figures(done, windows, ranks)


@torch.no_grad()
def _advanced(
    found: Found,
    batches: Sequence[Tensor],
    settings: EvalSettings,
    hidden: HiddenStates,
    ranks: Ranks,
    progress: Progress,
) -> tuple[StreamedModel, Stream]:
    """The model, and its stream behind the last block."""
    trust = settings.trust_remote_code
    model = StreamedModel(found.checkpoint, found.config, ranks.device, found.dtype, trust)
    stream = embed(model, batches, hidden, ranks)
    for block in walk(model, progress, f"perplexity of {found.path.name}, block by block"):
        block.advance(stream)
    return model, stream
