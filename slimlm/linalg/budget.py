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

    parameters(width) is linear in width. Widths are multiples of `divisor` and of `round_to`; without `round_to`, of
    the largest power of two up to 128 that gets near enough (kernels like round sizes): within TOLERANCE, and within
    half of what was asked, so that something is removed. None when nothing gets near enough.
    """
    for granule in (round_to,) if round_to else GRANULES:
        choice = nearest_width(full, parameters, dense_parameters, sparsity, math.lcm(granule, divisor))
        if choice is not None and abs(choice.sparsity - sparsity) <= min(TOLERANCE, sparsity / 2):
            return choice
    return None


def nearest_width(
    full: int, parameters: Callable[[int], int], dense_parameters: int, sparsity: float, multiple: int
) -> WidthChoice | None:
    """The multiple below `full` that comes nearest to `sparsity`; None when there is no such multiple."""
    base = parameters(0)
    exact = ((1 - sparsity) * dense_parameters - base) / ((parameters(full) - base) / full)
    below = math.floor(exact / multiple) * multiple
    last = (full - 1) // multiple * multiple
    choices = [
        WidthChoice(width, multiple, 1 - parameters(width) / dense_parameters)
        for width in {min(max(width, multiple), last) for width in (below, below + multiple)}
        if 0 < width < full
    ]
    return min(choices, key=lambda choice: abs(choice.sparsity - sparsity), default=None)
