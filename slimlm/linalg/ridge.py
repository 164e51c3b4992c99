"""Least squares towards a prior, its strength chosen on tokens that were held out."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from torch import Tensor

from slimlm.linalg.cholesky import factor_in_place
from slimlm.linalg.gram import add_products, gram_dtype

WIDEST = 4096  # inputs above which second moments of held-out tokens are not kept
HELD_ELEMENTS = 1 << 24  # of the inputs of held-out tokens, kept as they are instead
STRENGTHS = (30.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
GUESS = 0.1
SKETCH = 64  # outputs to choose a strength on
HELD_EVERY = 5
ROWS = 256  # at a time, of half a symmetric matrix
Batch = Annotated[Tensor, "batch time", int]  # of windows' tokens


def held_out(windows: int, start: int = 0) -> Annotated[Tensor, "{windows}", bool]:
    """Which of `windows` calibration windows, the first being number `start` of all, are held out: every fifth."""
    return torch.arange(start, start + windows) % HELD_EVERY == HELD_EVERY - 1


def learn_and_test(batches: Sequence[Batch], most: int) -> tuple[list[Batch], list[Batch]]:
    """Of calibration windows up to `most` to learn from and as many held-out ones to measure on (the same where there
    are too few), in batches of the same size."""
    tokens = torch.cat(list(batches))
    held = held_out(len(tokens))
    size = len(batches[0])
    learn = tokens[~held][:most]
    test = tokens[held][:most] if held.any() else learn
    return list(learn.split(size)), list(test.split(size))


class Moments:
    """Sums over tokens of `x^T x`: [in, in] and `x^T y`: [in, out]."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        dtype = gram_dtype(inputs)
        self.xx = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=dtype, device=device)

    def add(self, x: Annotated[Tensor, "tokens in"], y: Annotated[Tensor, "tokens out"]) -> None:
        """Add tokens, in fp32 or fp64."""
        add_products(self.xx, x, x)
        add_products(self.xy, x, y)

    @contextmanager
    def lent(self) -> Iterator[Annotated[Tensor, "in in"]]:
        """xx, to be used up inside the context: it is symmetric, so half of it is enough to have it back afterwards."""
        starts = range(0, len(self.xx), ROWS)
        half = [self.xx[start : start + ROWS, start:].clone() for start in starts]
        try:
            yield self.xx
        finally:
            for start, rows in zip(starts, half, strict=True):
                self.xx[start : start + ROWS, start:] = rows
                self.xx[start:, start : start + ROWS] = rows.T
                square = rows[:, : len(rows)].triu()
                self.xx[start : start + len(rows), start : start + len(rows)] = square + square.triu(1).T

    def take(self, kept: Annotated[Tensor, "kept", int]) -> "Moments":
        """The moments of the inputs numbered `kept`."""
        chosen = Moments(0, 0)
        chosen.xx, chosen.xy = self.xx[kept[:, None], kept], self.xy[kept]
        return chosen

    def through(self, map: Annotated[Tensor, "out few"]) -> "Moments":
        """The moments of x and y @ map."""
        mapped = Moments(0, 0)
        mapped.xx, mapped.xy = self.xx, self.xy @ map.to(self.xy)
        return mapped


class Rows:
    """Tokens as they are, x: [tokens, in] and y: [tokens, out]; of many every second, fourth, ... is kept."""

    def __init__(self, inputs: int) -> None:
        self.room = max(1, HELD_ELEMENTS // inputs)
        self.stride = 1
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Annotated[Tensor, "tokens in"], y: Annotated[Tensor, "tokens out"]) -> None:
        self.parts.append((x[:: self.stride].clone(), y[:: self.stride].clone()))
        while sum(len(x) for x, _ in self.parts) > self.room and len(self.parts[0][0]) > 1:
            self.parts = [(x[::2].clone(), y[::2].clone()) for x, y in self.parts]
            self.stride *= 2

    def take(self, kept: Annotated[Tensor, "kept", int]) -> "Rows":
        """The same tokens' inputs numbered `kept`."""
        chosen = Rows(kept.numel())
        chosen.parts = [(x[:, kept], y) for x, y in self.parts]
        return chosen

    def through(self, map: Annotated[Tensor, "out few"]) -> "Rows":
        """The same tokens' y @ map."""
        mapped = Rows(1)
        mapped.parts = [(x, y @ map.to(y)) for x, y in self.parts]
        return mapped


Windows = Annotated[Tensor, "windows time width"]
Weights = Annotated[Tensor, "windows time"]  # of the tokens' squares
Metric = Annotated[Tensor, "out out"]  # in which errors of held-out tokens count
Add = Callable[[Windows, Windows, Annotated[Tensor, "windows", bool], Weights | None], None]  # as `Regression.add`


@dataclass
class Regression:
    """What predicting y from x by least squares needs: of the tokens to fit, and of those held out.

    again: shows all data to a function like `add` once more. Of wide inputs a sample of the held-out tokens is kept,
    and it takes another look to have all of them in the fit in the end. prior: what `centre` took off y.
    """

    fit: Moments
    held: Moments | Rows
    again: Callable[[Add], None] | None = None
    joined: bool = False
    prior: Annotated[Tensor, "in out"] | None = None

    @classmethod
    def of(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> "Regression":
        """One without tokens; those of wide inputs are held out as they are, not as moments."""
        held = Rows(inputs) if inputs > WIDEST else Moments(inputs, outputs, device)
        return cls(Moments(inputs, outputs, device), held)

    def add(
        self,
        x: Annotated[Tensor, "windows time in"],
        y: Annotated[Tensor, "windows time out"],
        held: Annotated[Tensor, "windows", bool],
        weight: Weights | None = None,
    ) -> None:
        """Add windows, of which some are held out."""
        for moments, chosen in ((self.fit, ~held), (self.held, held)):
            if chosen.any():
                moments.add(*_weighted(x, y, chosen, weight))

    @contextmanager
    def gram(self) -> Iterator[Annotated[Tensor, "in in"]]:
        """x^T x of all tokens, to be used up inside the context. Where a sample of the held-out ones is kept,
        it takes another look at the data, and without one they are left out."""
        if isinstance(self.held, Moments):
            yield self.fit.xx + self.held.xx
            return
        with self.fit.lent() as gram:

            def add(x: Tensor, y: Tensor, held: Tensor, weight: Tensor | None = None) -> None:
                if held.any():
                    x, _ = _weighted(x, y[..., :0], held, weight)
                    gram.addmm_(x.T.to(gram), x.to(gram))

            if self.again is not None:
                self.again(add)
            yield gram

    def take(self, kept: Annotated[Tensor, "kept", int]) -> "Regression":
        """The data of the inputs numbered `kept`; where it is shown again, the others are gone."""
        return Regression(self.fit.take(kept), self.held.take(kept), self.again)

    def centre(self, start: Annotated[Tensor, "in out"]) -> None:
        """Replace y by what is left of it once x @ start is taken off, in place, once."""
        self.prior = start
        for data in (self.fit, self.held):
            if isinstance(data, Moments):
                data.xy.addmm_(data.xx, start.to(data.xy), alpha=-1)
            else:
                data.parts = [(x, y - x @ start.to(y)) for x, y in data.parts]

    def through(self, map: Annotated[Tensor, "out few"]) -> "Regression":
        """The same of y @ map: [out, few]; what has to do with x alone is shared."""
        return Regression(self.fit.through(map), self.held.through(map))

    def held_change(self, delta: Annotated[Tensor, "in out"], metric: Metric | None = None) -> float:
        """How much x @ delta changes the squared error of held-out tokens."""
        if isinstance(self.held, Moments):
            change = self.held.xx @ delta
            change.sub_(self.held.xy, alpha=2).mul_(delta if metric is None else delta @ metric)
            return float(change.sum())
        predicted = ((x @ delta, y) for x, y in self.held.parts)
        return sum(float(((z - 2 * y) * (z if metric is None else z @ metric)).sum()) for z, y in predicted)

    def join(self) -> Moments:
        """The held-out tokens put to those to fit, in place, once: all of them, where they can be shown again."""
        if self.joined:
            return self.fit
        self.joined = True
        if isinstance(self.held, Moments):
            self.fit.xx += self.held.xx
            self.fit.xy += self.held.xy
        elif self.again is not None:
            self.held.parts = []
            self.again(self._add_held)
        else:
            for x, y in self.held.parts:
                self.fit.add(x, y)
        return self.fit

    def _add_held(self, x: Tensor, y: Tensor, held: Tensor, weight: Tensor | None = None) -> None:
        if held.any():
            x, y = _weighted(x, y, held, weight)
            self.fit.add(x, y if self.prior is None else y - x @ self.prior.to(y))


def _weighted(x: Tensor, y: Tensor, chosen: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of the chosen windows, [tokens, in] and [tokens, out] in fp32, times the root of their weights."""
    factor = 1.0 if weight is None else weight[chosen].sqrt()[..., None].float()
    return (x[chosen].float() * factor).flatten(0, 1), (y[chosen].float() * factor).flatten(0, 1)


@dataclass(frozen=True)
class Fit:
    """strength: of the ridge, in mean squares of an input; infinite for the prior itself."""

    weight: Annotated[Tensor, "out in"]
    strength: float


def ridge(
    data: Regression, prior: Annotated[Tensor, "out in"], metric: Metric | None = None, guess: float = GUESS
) -> Fit:
    """argmin_W sum ||y - W x||^2 + lambda ||W - prior||^2 with lambda chosen on held-out tokens.

    Hoerl & Kennard 1970, shrunk towards the prior instead of zero. lambda is searched downhill from `guess` on a random
    projection of the outputs. Where the fit does not lower the held-out error it is the prior that stays, so that error
    never grows. Once chosen, lambda serves a fit to all tokens. Where a strength leaves the system numerically singular
    it is no choice. Uses `data` up.

    Returns the weight in the prior's precision, or fp32 where that is coarser.
    """
    data.centre(prior.T)
    metric = None if metric is None else metric.to(data.fit.xy)
    strength = _strength(data.through(_sketch(data.fit.xy, metric)), guess)
    unit = data.fit.xx.diagonal().mean().clamp_min(1e-30)
    delta = _solve(data.fit, strength * unit)
    exact = torch.promote_types(prior.dtype, torch.float32)
    if delta is None or not data.held_change(delta, metric) < 0:  # nor where it is no number
        return Fit(prior.to(exact), math.inf)
    del delta
    everything = data.join()
    delta = _solve(everything, strength * everything.xx.diagonal().mean())
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
