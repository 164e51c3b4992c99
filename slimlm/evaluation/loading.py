"""Whole models, through stock transformers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimlm.checkpoint.skeleton import BUILDING
from slimlm.device import placement
from slimlm.errors import UserError, one_line
from slimlm.settings import EvalSettings


def load_model(path: Path, settings: EvalSettings) -> PreTrainedModel:
    """The whole model through stock transformers. Raises UserError unless every weight is found in the checkpoint."""
    try:
        with BUILDING:
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
                device_map=settings.device_map or placement(torch.device(settings.device)),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded by transformers: {one_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise UserError(
                f"{path}: transformers reports {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:3]}"
            )
    return model.eval()
