"""What decoding a token should take, from the shapes of a model's products alone.

Each shape is timed by itself; what is no product (norms, attention, Python) is a constant for each block, fitted to the
dense model. So what a narrower model would take is known before there is one.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from slimlm.evaluation.speed.stock import finish, greedy
from slimlm.evaluation.speed.timing import Clock, Runner, Taken

Shape = tuple[int, int]  # outputs and inputs
MOST_BYTES = 512 * 2**20  # of weights that one shape's products go through in turns


@dataclass(frozen=True)
class Prediction:
    """Seconds that a step of decoding takes. products: of it, all products. seconds: with the blocks' constant."""

    batch_size: int
    products: float
    seconds: float


def product_shapes(model: PreTrainedModel, tokens: Tensor) -> Counter[Shape]:
    """How often each shape is multiplied with in a step of decoding, the head's included. tokens: [1, time] before it.

    Products with weights only: those of attention belong to the blocks' constant.
    """
    read, both = _Products(), _Products()
    for seen, new_tokens in ((read, 1), (both, 2)):
        with seen:
            greedy(model, tokens, new_tokens)
    return both.shapes - read.shapes


class ShapeTimes:
    """Times products of [rows, in] by weights of each shape, all of them once whenever it is asked to.

    Weights lie one behind the other and are as many bytes as all of a model's, up to MOST_BYTES, so that they are read
    from where a model's are: a cache only if that holds the whole model.
    """

    def __init__(
        self,
        shapes: Mapping[Shape, int],
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.shapes = shapes
        self.rows = rows
        self.clock = clock
        self.taken: dict[Shape, list[float]] = {shape: [] for shape in shapes}
        total = sum(out * inner * count for (out, inner), count in shapes.items())
        largest = max((out * inner for out, inner in shapes), default=0)
        room = max(min(total, MOST_BYTES // dtype.itemsize), largest)
        self.memory = torch.empty(room, dtype=dtype, device=device).uniform_(-1, 1)

    @torch.inference_mode()
    def measure(self) -> None:
        """Every shape once, with all the weights there is room for."""
        for shape, taken in self.taken.items():
            size = shape[0] * shape[1]
            weights = self.memory[: self.memory.numel() // size * size].view(-1, *shape)
            x = torch.ones(self.rows, shape[1], dtype=self.memory.dtype, device=self.memory.device)
            finish(self.memory.device)
            start = self.clock()
            for weight in weights:
                linear(x, weight)
            finish(self.memory.device)
            taken.append((self.clock() - start) / len(weights))

    @property
    def seconds(self) -> dict[Shape, float]:
        """Of one product of each shape: the median, without the first, which warms up."""
        return {shape: statistics.median(taken[1:]) for shape, taken in self.taken.items()}


@dataclass(frozen=True)
class WithShapes:
    """A runner after which the shapes of its products are timed, in the very same conditions."""

    runner: Runner
    times: ShapeTimes

    def run(self, prompts: Tensor, new_tokens: int) -> Taken:
        """prompts: [batch, time]"""
        taken = self.runner.run(prompts, new_tokens)
        self.times.measure()
        return taken


def products_seconds(shapes: Mapping[Shape, int], seconds: Mapping[Shape, float]) -> float:
    """What all products of a step take together."""
    return math.fsum(count * seconds[shape] for shape, count in shapes.items())


def block_constant(measured: float, products: float, blocks: int) -> float:
    """Seconds in each of the blocks of a model that are no product's, from what its step takes as measured."""
    return (measured - products) / blocks


def predicted_decode(products: float, blocks: int, constant: float) -> float:
    """Seconds of a step of decoding: its products, and each block's constant."""
    return products + blocks * constant


class _Products(TorchFunctionMode):
    """Counts products with weights, told by the functions that modules call."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if func is linear:
            self.shapes[args[1].shape[0], args[1].shape[1]] += 1
        elif func in (torch.mm, torch.addmm):
            self.shapes[args[-1].shape[1], args[-1].shape[0]] += 1
        return func(*args, **(kwargs or {}))
