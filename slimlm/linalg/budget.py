"""Spending a sparsity over several widths, from the loss each costs alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

SMALLEST_LOSS = 1e-6
TOLERANCE = 0.01


def is_near(removed: float, sparsity: float) -> bool:
    """Whether the share that is removed is what was asked for, to TOLERANCE, and anything at all."""
    return abs(removed - sparsity) <= min(TOLERANCE, sparsity / 2)


@dataclass(frozen=True)
class LossCurve:
    """Measured rise of the loss, [(units removed, nats a token)], removed units increasing from above 0."""

    points: Sequence[tuple[int, float]]

    def __call__(self, removed: int) -> float:
        """The rise at any number of removed units: a power law through the two nearest points (one point: linear)."""
        if removed == 0:
            return 0.0
        points = [(units, max(loss, SMALLEST_LOSS)) for units, loss in self.points]
        if not points:
            return math.inf
        if len(points) == 1:
            return points[0][1] * removed / points[0][0]
        index = next((i for i, (units, _) in enumerate(points) if units >= removed), len(points) - 1)
        (a, low), (b, high) = points[max(0, index - 1) : max(0, index - 1) + 2]
        slope = max(math.log(high / low) / math.log(b / a), 0.0)
        return float(low * (removed / a) ** slope)


def predicted_loss(curves: Mapping[str, LossCurve], removed: Mapping[str, int]) -> float:
    """The losses of several widths, taken to add up."""
    return sum(curves[axis](units) for axis, units in removed.items())


def spaced(largest: int, multiple: int, count: int) -> list[int]:
    """Up to `count` multiples between `multiple` and `largest`, evenly spaced, the largest among them."""
    steps = largest // multiple
    chosen = {max(1, round(steps * (index + 1) / count)) * multiple for index in range(count)} if steps else set()
    return sorted(chosen)


def cheapest_split(curves: Sequence[LossCurve], sizes: Sequence[int], percent: float, most: int) -> list[int]:
    """Of each part, how many hundredths go, so that `percent` of all goes (to half a hundredth of an average part) and
    the losses add up to the least.

    Dynamic programming over parts: the least loss of the parts so far for every amount removed in all. sizes: of the
    parts. most: hundredths of a part that may go.
    """
    unit = sum(sizes) / len(sizes)
    budget = round(percent * len(sizes))
    least = torch.full((budget + 1,), math.inf, dtype=torch.float64)
    least[0] = 0
    choices = []
    for curve, size in zip(curves, sizes, strict=True):
        taken = torch.tensor([round(count * size / unit) for count in range(most + 1)])
        loss = torch.tensor([curve(count) for count in range(most + 1)], dtype=torch.float64)
        before = torch.arange(budget + 1)[:, None] - taken
        total = torch.where(before >= 0, least[before.clamp_min(0)] + loss, math.inf)
        least, choice = total.min(1)
        choices.append((choice, taken))
    if not torch.isfinite(least[-1]):
        raise ValueError(f"no part may lose more than {most}%, and {percent:g}% are to go of all")
    found, left = [], budget
    for choice, taken in reversed(choices):
        count = int(choice[left])
        found.append(count)
        left -= int(taken[count])
    return found[::-1]
