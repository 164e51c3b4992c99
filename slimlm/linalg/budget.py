"""Spending a sparsity over several widths, from the loss each costs alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

SMALLEST_LOSS = 1e-6
TOLERANCE = 0.01


def is_near(removed: float, sparsity: float) -> bool:
    """Whether the share that is removed is what was asked for, to TOLERANCE, and anything at all."""
    return abs(removed - sparsity) <= min(TOLERANCE, sparsity / 2)


@dataclass(frozen=True)
class LossCurve:
    """Measured rise of the loss, [(units removed, nats a token)], removed units increasing from above 0.

    errors: the points' standard errors, where they are known. A rise below its own error, a fall not least, is noise
    and counts as that error: nothing measured is free. Removing more never costs less: points that fall are averaged
    (isotonic regression, Barlow et al. 1972).
    """

    points: Sequence[tuple[int, float]]
    errors: Sequence[float] = ()

    @cached_property
    def rising(self) -> list[tuple[int, float]]:
        """The points as they count."""
        errors = self.errors or [0.0] * len(self.points)
        losses = [max(loss, error, SMALLEST_LOSS) for (_, loss), error in zip(self.points, errors, strict=True)]
        return [(units, loss) for (units, _), loss in zip(self.points, isotonic(losses), strict=True)]

    @classmethod
    def measured(
        cls, losses: Sequence[tuple[int, Annotated[Tensor, "windows"]]], before: Annotated[Tensor, "windows"]
    ) -> "LossCurve":
        """From the loss of each window, with so many units removed and with none."""
        rises = [(units, *rise_of(loss, before)) for units, loss in losses]
        return cls([(units, rise) for units, rise, _ in rises], [error for *_, error in rises])

    def scaled(self, factor: float) -> "LossCurve":
        """The curve of so many times the loss."""
        points = [(units, loss * factor) for units, loss in self.points]
        return LossCurve(points, [error * factor for error in self.errors])

    def __call__(self, removed: int) -> float:
        """The rise at any number of removed units: between points a power law, below the first one that is at least
        linear; infinite beyond the last, where nothing was measured."""
        points = self.rising
        known = dict(points) | {0: 0.0}
        if removed in known:
            return known[removed]
        if not points or removed > points[-1][0]:
            return math.inf
        index = next(index for index, (units, _) in enumerate(points) if units >= removed)
        (a, low), (b, high) = points[max(0, index - 1)], points[min(max(index, 1), len(points) - 1)]
        slope = math.log(high / low) / math.log(b / a) if b > a else 1.0
        return float(low * (removed / a) ** (max(slope, 1.0) if index == 0 else slope))


def isotonic(values: Sequence[float]) -> list[float]:
    """The nondecreasing sequence nearest to the values in least squares: neighbours that fall are averaged."""
    runs: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        runs.append((value, 1))
        while len(runs) > 1 and runs[-2][0] > runs[-1][0]:
            (right, more), (left, count) = runs.pop(), runs.pop()
            runs.append(((left * count + right * more) / (count + more), count + more))
    return [mean for mean, count in runs for _ in range(count)]


def rise_of(after: Annotated[Tensor, "windows"], before: Annotated[Tensor, "windows"]) -> tuple[float, float]:
    """Mean rise of a loss measured on the same windows before and after, and its standard error.

    The error is that of paired differences; of a single window none can be told, and it is 0.
    """
    differences = (after - before).double()
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return float(differences.mean()), error


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

    Dynamic programming over parts, as in SPDY (Frantar & Alistarh, arXiv 2201.13096): the least loss of the parts so
    far for every amount removed in all. sizes: of the parts. most: hundredths of a part that may go. Raises ValueError
    where that is too little.
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
    left = int(torch.isfinite(least).nonzero().max())
    if budget - left > len(sizes) / 2:  # more than rounding each part's hundredths comes to
        raise ValueError(f"no part may lose more than {most}%, and {percent:g}% are to go of all")
    found = []
    for choice, taken in reversed(choices):
        count = int(choice[left])
        found.append(count)
        left -= int(taken[count])
    return found[::-1]
