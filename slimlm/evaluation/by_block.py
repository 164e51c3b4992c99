"""Perplexity of a model larger than memory: one block at a time, the same number as of the whole model."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.checkpoint.reader import Checkpoint
from slimlm.checkpoint.skeleton import auto_dtype, load_config
from slimlm.device import available_memory, return_memory_at_once
from slimlm.evaluation.perplexity import LogLikelihood, counted
from slimlm.families import FAMILIES
from slimlm.model.ends import embed, nll
from slimlm.model.hidden import Scratch
from slimlm.model.streamed import StreamedModel
from slimlm.model.walk import walk
from slimlm.progress import Progress
from slimlm.ranks import Ranks
from slimlm.settings import EvalSettings

HEADROOM = 1.1  # of a model's weights, for what is computed beside them


def has_no_room(path: Path, settings: EvalSettings, ranks: Ranks) -> bool:
    """Whether some rank has too little memory for all of a model that could be streamed instead."""
    is_known = load_config(path, settings.trust_remote_code).model_type in FAMILIES
    if settings.tasks or settings.device_map or not is_known:
        return False
    place = ranks.host, str(ranks.device)
    wanted = HEADROOM * ranks.gather(place).count(place) * Checkpoint(path).elements * _dtype(path, settings).itemsize
    room = available_memory(ranks.device)
    return any(ranks.gather(wanted > room.get("gpu", room["host"])))


def _dtype(path: Path, settings: EvalSettings) -> torch.dtype:
    if settings.dtype != "auto":
        named: torch.dtype = getattr(torch, settings.dtype)
        return named
    return auto_dtype(load_config(path, settings.trust_remote_code), Checkpoint(path))


@torch.no_grad()
def measure_by_block(
    path: Path, windows: Tensor, settings: EvalSettings, ranks: Ranks, progress: Progress
) -> tuple[LogLikelihood, PreTrainedModel]:
    """Log-likelihood of windows: [n, time], and the model without its weights. Hidden states wait in temporary files.

    Raises UserError for a family that slimlm does not know, RunFailure when a number is not finite or a disk is full.
    """
    return_memory_at_once()
    config = load_config(path, settings.trust_remote_code)
    dtype = _dtype(path, settings)
    model = StreamedModel(Checkpoint(path), config, ranks.device, dtype, settings.trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="slimlm-") as place, Scratch(Path(place), ranks.device) as scratch:
        stream = embed(model, windows.split(settings.batch_size), scratch.hidden("dense"), ranks)
        for block in walk(model, progress, f"perplexity of {path.name}, block by block"):
            block.advance(stream)
        found = nll(model, stream)
    ranks.note("windows", sum(map(len, stream.tokens)))
    return counted(LogLikelihood(dtype), found, windows, settings.batch_size), model.model
