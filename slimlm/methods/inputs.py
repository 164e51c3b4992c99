"""What is known of the inputs of a block's linears."""

from functools import partial

import torch
from torch import Tensor, nn

from slimlm.errors import RunFailure
from slimlm.linalg.ridge import Moments
from slimlm.stream import Stream, hooked
from slimlm.walk import StreamedModel


def input_statistics(
    model: StreamedModel, index: int, stream: Stream, block: nn.Module, norms: bool = False, onward: bool = False
) -> dict[str, Tensor]:
    """For the first of the linears that share an input: its Gram [in, in] over the stream's tokens, or just its norms.

    onward: whether the stream goes past the block, or stays before it. Raises RunFailure on NaN.
    """
    squares: dict[str, Tensor] = {}
    moments: dict[str, Moments] = {}

    def observe(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        x = args[0].flatten(0, -2).float()
        if norms:
            added = x.double().square().sum(0)
            squares[name] = squares[name] + added if name in squares else added
        else:
            moments.setdefault(name, Moments(x.shape[1], 0, x.device)).add(x, x[:, :0])

    with hooked((block.get_submodule(names[0]), partial(observe, name=names[0])) for names in model.family.inputs):
        (model.advance if onward else model.observe)(index, stream)
    found = {name: value.sqrt().float() for name, value in squares.items()} | {
        name: value.xx for name, value in moments.items()
    }
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise RunFailure(f"inputs of {model.family.block(index)}.{name} hold NaN or Inf")
    return found
