"""A checkpoint's model whole in memory, as stock transformers loads it."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimlm.checkpoint.skeleton import BUILDING
from slimlm.device import placement
from slimlm.model.streamed import StreamedModel


def whole(model: StreamedModel, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """In eval mode, on the streamed model's device, in the checkpoint's dtype or another."""
    with BUILDING:
        found = AutoModelForCausalLM.from_pretrained(
            model.checkpoint.path,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            device_map=placement(model.device),
        )
    return found.eval()
