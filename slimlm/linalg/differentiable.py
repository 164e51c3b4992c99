"""Functions whose gradients are written out, for autograd."""

from typing import Annotated, Protocol

import torch
from torch import Tensor

Given = Annotated[Tensor, "..."] | Annotated[Tensor, "...", int]


class Context(Protocol):
    """What autograd keeps of a function's call."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Given) -> None:
        """Tensors, of any shape, for the gradient."""


def applied(function: type[torch.autograd.Function], *tensors: Given) -> Annotated[Tensor, "..."]:
    """What a function of tensors, of any shape, comes to: [...]."""
    found: Tensor = function.apply(*tensors)  # type: ignore[no-untyped-call]
    return found
