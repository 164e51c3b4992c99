"""Fitting what a softmax head reads to another head's predictions."""

import math
from typing import Annotated

import torch
from torch import Tensor

RATE = 0.016  # of the map's own root mean square, at the start
MOMENTS = (0.9, 0.95)
CHUNK_LOGITS = 1 << 26
SMALLEST_SHARE = 1e-6  # of the largest eigenvalue of the inputs' Gram: directions below it move no further


def cosine(done: float) -> float:
    """Of the first step's rate, what is left once this share of all steps is done."""
    return 0.5 * (1 + math.cos(math.pi * done))


class MapFit:
    """A map [out, in] such that `head @ map @ x'` predicts what `head @ x` does, fitted to the KL divergence.

    Adam (arXiv 1412.6980) with cosine decay, in coordinates in which the inputs are white, so that all their directions
    are learned at one rate. gram: of the inputs.
    """

    def __init__(
        self,
        head: Annotated[Tensor, "vocab out"],
        bias: Annotated[Tensor, "vocab"] | None,
        start: Annotated[Tensor, "out in"],
        gram: Annotated[Tensor, "in in"],
        rate: float = RATE,
    ) -> None:
        self.head, self.bias = head, bias
        energies, vectors = torch.linalg.eigh(gram.double() / gram.diagonal().mean())
        energies = energies.clamp_min(SMALLEST_SHARE * energies.max())
        self.whiten = (vectors * energies.rsqrt()).float()
        self.point = start.float() @ (vectors * energies.sqrt()).float()
        self.rate = rate * float(self.point.square().mean().sqrt())
        self.first, self.second = torch.zeros_like(self.point), torch.zeros_like(self.point)
        self.steps = 0

    @property
    def map(self) -> Annotated[Tensor, "out in"]:
        """As it is after the steps taken so far."""
        mapped: Tensor = self.point @ self.whiten.T
        return mapped

    def add_gradient(
        self,
        total: Annotated[Tensor, "out in"],
        x: Annotated[Tensor, "tokens out"],
        seen: Annotated[Tensor, "tokens in"],
    ) -> Annotated[Tensor, "out in"]:
        """The total with the gradient of tokens that the dense head sees as x and the other as `seen`."""
        for target, source in self._chunks(x, seen):
            error = self._probabilities(source @ self.point.T)
            error -= self._probabilities(target)
            total += (error @ self.head).T @ source
        return total

    def step(self, gradient: Annotated[Tensor, "out in"], tokens: int, done: float) -> None:
        """One step for the gradient of so many tokens' losses, used up.

        done: the share of all steps that are then taken.
        """
        gradient /= tokens
        self.steps += 1
        self.first.lerp_(gradient, 1 - MOMENTS[0])
        self.second.lerp_(gradient.square(), 1 - MOMENTS[1])
        direction = self.first / (1 - MOMENTS[0] ** self.steps)
        scale = (self.second / (1 - MOMENTS[1] ** self.steps)).sqrt()
        rate = self.rate * cosine(done)
        self.point -= rate * direction / (scale + 1e-12)

    def divergence(self, x: Annotated[Tensor, "tokens out"], seen: Annotated[Tensor, "tokens in"]) -> float:
        """Summed over tokens, KL(dense head on x || head on the mapped `seen`)."""
        total = 0.0
        for target, source in self._chunks(x, seen):
            wanted = self._logits(target).log_softmax(-1)
            got = self._logits(source @ self.point.T).log_softmax(-1)
            total += float((wanted.exp() * (wanted - got)).sum(dtype=torch.float64))
        return total

    def _chunks(self, x: Tensor, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(1, CHUNK_LOGITS // self.head.shape[0])
        return list(zip(x.split(size), (seen @ self.whiten).split(size), strict=True))

    def _logits(self, x: Tensor) -> Tensor:
        logits = x @ self.head.T
        return logits if self.bias is None else logits + self.bias

    def _probabilities(self, x: Tensor) -> Tensor:
        return self._logits(x).softmax(-1)
