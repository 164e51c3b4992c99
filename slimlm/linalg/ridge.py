"""Least squares towards a prior, its strength chosen on tokens that were held out: the parts of `fit/ridge.py`."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from torch import Tensor

from slimlm.linalg.cholesky import factor_in_place
from slimlm.linalg.regression import Metric, Moments, Regression

STRENGTHS = (30.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
GUESS = 0.1
SKETCH = 64  # outputs to choose a strength on


@dataclass(frozen=True)
class Fit:
    """strength: of the ridge, in mean squares of an input; infinite for the prior itself."""

    weight: Annotated[Tensor, "out in"]
    strength: float


def chosen_strength(data: Regression, metric: Metric | None, guess: float) -> float:
    """That of the ridge for data that are centred; infinite where the prior is to stay."""
    metric = None if metric is None else metric.to(data.fit.xy)
    strength = _strength(data.through(_sketch(data.fit.xy, metric)), guess)
    unit = data.fit.xx.diagonal().mean().clamp_min(1e-30)
    delta = _solve(data.fit, strength * unit)
    lowers = delta is not None and data.held_change(delta, metric) < 0  # not where it is no number, either
    return strength if lowers else math.inf


def fitted(data: Regression, prior: Annotated[Tensor, "out in"], strength: float) -> Fit:
    """The ridge regression of a strength on data that are centred and joined."""
    exact = torch.promote_types(prior.dtype, torch.float32)
    delta = None
    if math.isfinite(strength):
        delta = _solve(data.fit, strength * data.fit.xx.diagonal().mean())
    if delta is None:
        return Fit(prior.to(exact), math.inf)
    return Fit((prior.T + delta).T.to(exact), strength)


def _sketch(like: Tensor, metric: Tensor | None) -> Tensor:
    """[out, few], whose product with its transpose is the metric (or the identity) on average."""
    outputs = like.shape[1]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(outputs, SKETCH, dtype=like.dtype, generator=generator).to(like.device)
    plain = torch.eye(outputs, dtype=like.dtype, device=like.device) if outputs <= SKETCH else normal
    if metric is None:
        return plain
    system = metric.clone()
    system.diagonal().add_(1e-6 * metric.diagonal().mean())
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(system)
    if failed:  # of weights so uneven that their products are not definite in this precision
        return plain
    return root if outputs <= SKETCH else root @ normal


def _strength(data: Regression, guess: float) -> float:
    """The best of STRENGTHS for held-out tokens, from `guess` on to either side as long as it gets better."""
    unit = data.fit.xx.diagonal().mean().clamp_min(1e-30)

    @cache
    def loss(place: int) -> float:
        delta = _solve(data.fit, STRENGTHS[place] * unit) if 0 <= place < len(STRENGTHS) else None
        return math.inf if delta is None else data.held_change(delta)

    place = STRENGTHS.index(guess)
    while loss(place) == math.inf and place:
        place -= 1
    for direction in (-1, 1):
        while loss(place + direction) < loss(place):
            place += direction
    return STRENGTHS[place]


def _solve(data: Moments, damping: Tensor | float) -> Tensor | None:
    """(xx + damping I)^-1 xy: [in, out], or None where that is not positive definite in this precision."""
    system = data.xx.clone()
    system.diagonal().add_(damping)
    factor = factor_in_place(system)
    if factor is None:
        return None
    solution: Tensor = torch.linalg.solve_triangular(factor, data.xy, upper=False)  # cholesky_solve copies the factor
    torch.linalg.solve_triangular(factor.mT, solution, upper=True, out=solution)
    return solution
