"""Least squares towards a prior, its strength chosen on tokens that were held out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WIDE = 4096  # inputs above which second moments are kept in fp32: they are the largest thing there is then
STRENGTHS = (math.inf, 30.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
HELD_EVERY = 5


def held_out(windows: int, start: int = 0) -> Tensor:
    """Which of `windows` calibration windows, the first being number `start` of all, are held out: every fifth."""
    return torch.arange(start, start + windows) % HELD_EVERY == HELD_EVERY - 1


class Moments:
    """Sums over tokens of `x^T x`: [in, in] and `x^T y`: [in, out]."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        dtype = torch.float32 if inputs > WIDE else torch.float64
        self.xx = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=dtype, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: [tokens, in], y: [tokens, out], in fp32 or fp64."""
        self.xx += x.T @ x
        self.xy += x.T @ y

    def take(self, kept: Tensor) -> "Moments":
        """The moments of the inputs numbered `kept`."""
        chosen = object.__new__(Moments)
        chosen.xx, chosen.xy = self.xx[kept][:, kept], self.xy[kept]
        return chosen


@dataclass
class Regression:
    """What predicting y from x by least squares needs: moments of the tokens to fit, and of those held out."""

    fit: Moments
    held: Moments

    @classmethod
    def of(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "Regression":
        return cls(Moments(inputs, outputs, device), Moments(inputs, outputs, device))

    def add(self, x: Tensor, y: Tensor, held: Tensor, weight: Tensor | None = None) -> None:
        """x: [windows, time, in], y: [windows, time, out]; held: [windows]; weight: [windows, time] of the squares."""
        scale = torch.ones(x.shape[:2], device=x.device) if weight is None else weight.sqrt()
        for moments, chosen in ((self.fit, ~held), (self.held, held)):
            if chosen.any():
                factor = scale[chosen][..., None].float()
                moments.add((x[chosen].float() * factor).flatten(0, 1), (y[chosen].float() * factor).flatten(0, 1))

    def take(self, kept: Tensor) -> "Regression":
        return Regression(self.fit.take(kept), self.held.take(kept))


@dataclass(frozen=True)
class Fit:
    """weight: [out, in]. strength: of the ridge, in mean squares of an input; infinite for the prior itself."""

    weight: Tensor
    strength: float


def ridge(data: Regression, prior: Tensor, metric: Tensor | None = None) -> Fit:
    """argmin_W sum ||y - W x||^2 + lambda ||W - prior||^2 with lambda chosen on held-out tokens; prior: [out, in].

    Hoerl & Kennard 1970, shrunk towards the prior instead of zero. metric: [out, out], in which held-out errors count.
    The prior itself is one of the choices, so that the held-out error never grows. Once chosen, lambda serves a fit
    to all tokens. Where a strength leaves the system numerically singular it is no choice.
    """
    start = prior.T.to(data.fit.xx)
    unit = data.fit.xx.diagonal().mean().clamp_min(1e-30)
    residual = data.fit.xy - data.fit.xx @ start
    held = data.held.xy - data.held.xx @ start
    if metric is not None:
        metric = metric.to(held)
    best, strength = 0.0, math.inf
    for candidate in STRENGTHS[1:]:
        delta = _solve(data.fit.xx, candidate * unit, residual)
        if delta is None:
            break
        gradient = data.held.xx @ delta - 2 * held
        change = delta if metric is None else delta @ metric
        loss = float((gradient * change).sum())
        if loss < best:
            best, strength = loss, candidate
    if math.isinf(strength):
        return Fit(prior, strength)
    everything = data.fit.xx + data.held.xx
    unit = unit * everything.diagonal().mean() / data.fit.xx.diagonal().mean()
    delta = _solve(everything, strength * unit, residual + held)
    if delta is None:
        return Fit(prior, math.inf)
    return Fit((start + delta).T.to(prior.dtype), strength)


def _solve(gram: Tensor, damping: Tensor, right: Tensor) -> Tensor | None:
    """(gram + damping I)^-1 right, or None where that is not positive definite in this precision."""
    system = gram.clone()
    system.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(system)
    return None if bool(failed) else torch.cholesky_solve(right, factor)
