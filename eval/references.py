"""What the scripts that run published implementations have in common. For those implementations' own environments: it
needs torch, numpy and the transformers of their time, and nothing of slimlm."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def parser_of(description: str, reference: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help=reference)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="int64 tokens [windows, time], .npy")
    parser.add_argument("--tests", type=Path, nargs="+", required=True)
    return parser


def windows_of(path: Path) -> Tensor:
    return torch.from_numpy(numpy.load(path))


def in_bf16(model: Any) -> Any:
    """The model with its weights in bf16, in place; rotary frequencies stay as a loaded checkpoint has them."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16()
    return model


@torch.no_grad()
def perplexities(model: Any, tests: list[Tensor]) -> list[float]:
    """exp of the mean negative log-likelihood over tokens 1.. of every window, for each array [windows, time]."""
    found = []
    for windows in tests:
        total = 0.0
        for batch in windows.split(32):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="sum"))
        found.append(round(math.exp(total / windows[:, 1:].numel()), 4))
    return found
