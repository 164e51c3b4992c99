"""What is known of the inputs of a block's linears."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimlm.errors import RunFailure
from slimlm.linalg.ridge import Moments
from slimlm.stream import Stream
from slimlm.walk import StreamedModel


@dataclass
class Inputs:
    """For the first of the linears that share an input: its Gram [in, in] over the stream's tokens, or just its norms
    [in]; and how many tokens these are of. What no token reached is not there."""

    statistics: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def input_statistics(
    model: StreamedModel,
    index: int,
    stream: Stream,
    names: Sequence[str] | None = None,
    norms: bool = False,
    onward: bool = False,
) -> Inputs:
    """What the linears of block `index`, its weights loaded, see of a stream.

    names: of those to look at, all by default. onward: whether the stream goes past the block, or stays before it.
    Raises RunFailure on NaN.
    """
    squares: dict[str, Tensor] = {}
    moments: dict[str, Moments] = {}
    seen = Inputs()

    def see(name: str, x: Tensor, _: Tensor) -> None:
        x = x.flatten(0, -2).float()
        seen.tokens[name] = seen.tokens.get(name, 0) + len(x)
        if norms:
            added = x.double().square().sum(0)
            squares[name] = squares[name] + added if name in squares else added
        else:
            if name not in moments:
                moments[name] = Moments(x.shape[1], 0, x.device)
            moments[name].add(x, x[:, :0])

    names = [group[0] for group in model.anatomy[index].inputs] if names is None else names
    with model.watched(index, names, see):
        (model.advance if onward else model.observe)(index, stream)
    seen.statistics = {name: value.sqrt().float() for name, value in squares.items()} | {
        name: value.xx for name, value in moments.items()
    }
    for name, value in seen.statistics.items():
        if not torch.isfinite(value.diagonal() if value.dim() == 2 else value).all():
            raise RunFailure(f"inputs of {model.family.block(index)}.{name} hold NaN or Inf")
    return seen
