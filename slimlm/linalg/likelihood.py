"""What a model's logits make of the tokens that came."""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

LOSS_CHUNK = 2048


def window_nll(
    logits: Annotated[Tensor, "batch time vocab"], targets: Annotated[Tensor, "batch time", int]
) -> Annotated[Tensor, "batch"]:
    """Negative log-likelihood of each window's targets under its logits, fp64."""
    windows = []
    for scores, wanted in zip(
        logits, targets, strict=True
    ):  # a window at a time: logits are the largest tensor there is
        parts = zip(scores.split(LOSS_CHUNK), wanted.split(LOSS_CHUNK), strict=True)
        windows.append(
            sum(cross_entropy(part.float(), target, reduction="none").double().sum() for part, target in parts)
        )
    return torch.stack([torch.as_tensor(window, dtype=torch.float64) for window in windows])


def divergence(
    logits: Annotated[Tensor, "windows time vocabulary"], wanted: Annotated[Tensor, "windows time vocabulary"]
) -> Annotated[Tensor, ""]:
    """KL(wanted || logits) of next-token distributions, summed over all positions, in fp32 and nats (distillation,
    arXiv 1503.02531, at temperature 1)."""
    got, target = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    total: Tensor = kl_div(got, target, reduction="sum", log_target=True)
    return total
