"""What decoding a token should take, from the shapes of the products of a model that is measured."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from slimlm.evaluation.speed.timing import Runner
from slimlm.model.decoding import Taken, greedy
from slimlm.model.shape_times import Shape, ShapeTimes


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


_TURNED = (torch.mm, torch.addmm, Tensor.matmul, Tensor.__matmul__)  # which get weights as [in, out]


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
        elif func in _TURNED and args[-1].dim() == 2:
            self.shapes[args[-1].shape[1], args[-1].shape[0]] += 1
        return func(*args, **(kwargs or {}))
