"""How long products take, by their shapes.

Each shape is timed by itself; what is no product (norms, attention, Python) is a constant for each block, fitted to a
model that was run. So what a narrower model would take is known before there is one.
"""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from slimlm.model.decoding import Clock, finish
from slimlm.plain import Json

Shape = tuple[int, int]  # outputs and inputs
MOST_BYTES = 512 * 2**20  # of weights that one shape's products go through in turns


class ShapeTimes:
    """Times products of [rows, in] by weights of each shape, all of them once whenever it is asked to.

    Weights lie one behind the other and are as many bytes as all of a model's, up to MOST_BYTES, so that they are read
    from where a model's are: a cache only if that holds the whole model. turn: bytes that one shape goes through at a
    time, going on where the last one ended.
    """

    def __init__(
        self,
        shapes: Mapping[Shape, int],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        clock: Clock = time.perf_counter,
        turn: int = MOST_BYTES,
    ) -> None:
        self.shapes = shapes
        self.rows = rows
        self.clock = clock
        self.taken: dict[Shape, list[float]] = {shape: [] for shape in shapes}
        total = sum(out * inner * count for (out, inner), count in shapes.items())
        largest = max((out * inner for out, inner in shapes), default=0)
        room = max(min(total, MOST_BYTES // dtype.itemsize), largest)
        self.turn = turn // dtype.itemsize
        self.place = 0
        self.memory = torch.empty(room, dtype=dtype, device=device).uniform_(-1, 1)

    @torch.inference_mode()
    def measure(self) -> None:
        """Every shape once, with as many weights as are a turn, or at least one."""
        for shape, taken in self.taken.items():
            size = shape[0] * shape[1]
            weights = self._weights(size).view(-1, *shape)
            x = torch.ones(self.rows, shape[1], dtype=self.memory.dtype, device=self.memory.device)
            finish(self.memory.device)
            start = self.clock()
            for weight in weights:
                linear(x, weight)
            finish(self.memory.device)
            taken.append((self.clock() - start) / len(weights))

    def _weights(self, size: int) -> Tensor:
        """The next whole weights of this size."""
        length = max(1, min(self.turn, self.memory.numel()) // size) * size
        start = self.place if self.place + length <= self.memory.numel() else 0
        self.place = start + length
        return self.memory[start : self.place]

    @property
    def seconds(self) -> dict[Shape, float]:
        """Of one product of each shape: the median, without the first, which warms up."""
        return {shape: statistics.median(taken[1:]) for shape, taken in self.taken.items()}


@dataclass(frozen=True)
class StepTimes:
    """Seconds, as measured: of a step of decoding by a model's first `blocks` blocks and all around them, and of one
    product of each shape."""

    step: float
    blocks: int
    products: Mapping[Shape, float]

    def described(self) -> dict[str, Json]:
        """As JSON holds it."""
        products = [[*shape, seconds] for shape, seconds in sorted(self.products.items())]
        return {"step": self.step, "blocks": self.blocks, "products": products}

    @classmethod
    def read(cls, step: float, blocks: int, products: list[tuple[int, int, float]]) -> "StepTimes":
        """What `described` gave."""
        return cls(step, blocks, {(out, inner): seconds for out, inner, seconds in products})


def products_seconds(shapes: Mapping[Shape, int], seconds: Mapping[Shape, float]) -> float:
    """What all products of a step take together."""
    return math.fsum(count * seconds[shape] for shape, count in shapes.items())


def block_constant(measured: float, products: float, blocks: int) -> float:
    """Seconds in each of the blocks of a model that are no product's, from what its step takes as measured."""
    return (measured - products) / blocks


def predicted_decode(products: float, blocks: int, constant: float) -> float:
    """Seconds of a step of decoding: its products, and each block's constant."""
    return products + blocks * constant
