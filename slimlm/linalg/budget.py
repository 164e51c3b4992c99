"""Choosing widths for a requested sparsity."""

import math
from collections.abc import Callable
from dataclasses import dataclass

TOLERANCE = 0.01
GRANULES = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class WidthChoice:
    """A width, what it was rounded to, and the sparsity it achieves."""

    width: int
    multiple: int
    sparsity: float


def choose_width(
    full: int,
    parameters: Callable[[int], int],
    dense_parameters: int,
    sparsity: float,
    divisor: int = 1,
    round_to: int | None = None,
) -> WidthChoice | None:
    """The width below `full` whose parameter count comes nearest to removing `sparsity` of the dense count.

    Widths are multiples of `divisor` and of `round_to`; without `round_to`, of the largest power of two up to 128 that
    gets within TOLERANCE (kernels like round sizes). None when nothing gets within TOLERANCE.
    """
    for granule in (round_to,) if round_to else GRANULES:
        choice = nearest_width(full, parameters, dense_parameters, sparsity, math.lcm(granule, divisor))
        if choice is not None and abs(choice.sparsity - sparsity) <= TOLERANCE:
            return choice
    return None


def nearest_width(
    full: int, parameters: Callable[[int], int], dense_parameters: int, sparsity: float, multiple: int
) -> WidthChoice | None:
    """The multiple below `full` that comes nearest to `sparsity`; None when there is no such multiple."""
    choices = [
        WidthChoice(width, multiple, 1 - parameters(width) / dense_parameters)
        for width in range(multiple, full, multiple)
    ]
    return min(choices, key=lambda choice: abs(choice.sparsity - sparsity), default=None)
