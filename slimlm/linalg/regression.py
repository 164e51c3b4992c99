"""Data for least squares as sums over tokens: of those to fit, and of those held out to choose by."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from slimlm.linalg.gram import Sums, add_gram, add_products, gram_dtype

WIDEST = 4096  # inputs above which second moments of held-out tokens are not kept
HELD_ELEMENTS = 1 << 24  # of the inputs of held-out tokens, kept as they are instead
HELD_EVERY = 5
JUDGING_EVERY = 3 * HELD_EVERY
LEAST_JUDGING = 4
ROWS = 256  # at a time, of half a symmetric matrix
Batch = Annotated[Tensor, "batch time", int]  # of windows' tokens


def held_out(windows: int, start: int = 0) -> Annotated[Tensor, "{windows}", bool]:
    """Which of `windows` calibration windows, the first being number `start` of all, are held out: every fifth."""
    return torch.arange(start, start + windows) % HELD_EVERY == HELD_EVERY - 1


def judging(windows: int) -> Annotated[Tensor, "{windows}", bool]:
    """Which of those held out no fit is to see in the end either, since they judge between it and another: a third, or
    none where that is too few."""
    chosen = torch.arange(windows) % JUDGING_EVERY == JUDGING_EVERY - 1
    return chosen & (windows >= LEAST_JUDGING * JUDGING_EVERY)


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
        add_gram(self.xx, x)
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

    def tensors(self) -> list[Sums]:
        """xx [in, in] and xy [in, out]."""
        return [self.xx, self.xy]

    def replace(self, tensors: Sequence[Sums]) -> None:
        """Hold these instead: [in, in] and [in, out]."""
        self.xx, self.xy = tensors

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
    """Tokens as they are, x: [tokens, in] and y: [tokens, out]; of many every second, fourth, ... is kept.

    apart: how many of these are to make up one, elsewhere.
    """

    def __init__(self, inputs: int, apart: int = 1) -> None:
        self.room = max(1, HELD_ELEMENTS // inputs // apart)
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


def keeps_rows(inputs: int) -> bool:
    """Whether held-out tokens of so many inputs are kept as they are, not as moments."""
    return inputs > WIDEST


@dataclass
class Regression:
    """What predicting y from x by least squares needs: of the tokens to fit, and of those held out.

    again: shows all data once more to a function like `add`, which adds to the given tensors. Of wide inputs a sample
    of the held-out tokens is kept, and it takes another look to have all of them in the fit in the end. prior: what
    `centre` took off y.
    """

    fit: Moments
    held: Moments | Rows
    again: Callable[[Add, Sequence[Sums]], None] | None = None
    joined: bool = False
    prior: Annotated[Tensor, "in out"] | None = None

    @classmethod
    def of(cls, inputs: int, outputs: int, device: torch.device | str = "cpu", apart: int = 1) -> "Regression":
        """One without tokens; those of wide inputs are held out as they are, not as moments. apart: as in `Rows`."""
        held = Rows(inputs, apart) if keeps_rows(inputs) else Moments(inputs, outputs, device)
        return cls(Moments(inputs, outputs, device), held)

    def tensors(self) -> list[Sums]:
        """Moments, [...] each, but for tokens that are kept as they are."""
        return [*self.fit.tensors(), *(self.held.tensors() if isinstance(self.held, Moments) else ())]

    def replace(self, tensors: Sequence[Sums]) -> None:
        """Hold these instead, [...] each."""
        self.fit.replace(tensors[:2])
        if isinstance(self.held, Moments):
            self.held.replace(tensors[2:])

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
                self.again(add, [gram])
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
            self.again(self._add_held, self.fit.tensors())
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
