"""Whether numbers are numbers."""

from typing import Annotated

import torch
from torch import Tensor


def all_finite(x: Annotated[Tensor, "..."]) -> Annotated[Tensor, "", bool]:
    """Whether a tensor of any shape holds no NaN and no Inf: a bool tensor of no dimensions, on the same device.

    By its least and its largest number, which are NaN where any is: a read of it, and nothing as large is made, which
    `torch.isfinite` does and takes many times as long for.
    """
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.isfinite(torch.stack(torch.aminmax(x))).all()
