"""A checkpoint's model whole in memory, as stock transformers loads it."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimlm.attention import attend_fast
from slimlm.checkpoint.skeleton import BUILDING
from slimlm.device import placement
from slimlm.model.streamed import StreamedModel


def whole(model: StreamedModel, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """In eval mode, on the streamed model's device, in the checkpoint's dtype or another; attention is as fast as can
    be."""
    with BUILDING:
        found = AutoModelForCausalLM.from_pretrained(
            model.checkpoint.path,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            device_map=placement(model.device),
        )
    attend_fast(found)
    return found.eval()


def recompute(parts: Iterable[nn.Module]) -> None:
    """Have parts of a model, most often its layers, keep nothing but what enters them for a gradient, and compute the
    rest again (arXiv 1604.06174). transformers' own way is for models in train mode, in which dropout acts."""
    for part in parts:
        again: Callable[..., object] = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
        part.forward = again
