"""Measured models beside the dense one: what decoding should take by shapes alone, and whether they are faster."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.device import product_dtype
from slimlm.evaluation.speed.contenders import Contender
from slimlm.evaluation.speed.figures import ModelSpeed
from slimlm.evaluation.speed.shape_times import Prediction, product_shapes
from slimlm.evaluation.speed.timing import BatchSpeed, decode_ratio, prefill_ratio
from slimlm.evaluation.speed.verdict import Facts, verdict
from slimlm.model.decoding import Clock
from slimlm.model.shape_times import Shape, ShapeTimes, block_constant, predicted_decode, products_seconds

Widths = frozenset[int]


def known_shapes(one: Contender, prompts: Tensor) -> Counter[Shape]:
    """What a step of decoding multiplies with, where transformers runs a model with the kernels it comes with, and
    nothing elsewhere, nor of a mixture, whose experts are packed. prompts: [batch, time] to find out with."""
    if one.model is None or one.swapped is not None or any(each.dim() > 2 for each in one.model.parameters()):
        return Counter()
    return product_shapes(one.model, prompts[:1].to(one.model.device))


def shape_times(one: Contender, shapes: Counter[Shape], rows: int, clock: Clock) -> ShapeTimes | None:
    """What times a model's shapes for batches of so many rows, where they are known."""
    if one.model is None or not shapes:
        return None
    return ShapeTimes(shapes, rows, one.model.dtype, one.model.device, clock)


def predictions(
    contenders: Sequence[Contender], times: Sequence[ShapeTimes | None], speeds: Sequence[BatchSpeed]
) -> list[Prediction | None]:
    """Of each model at one batch size, the dense one last: its own is what the blocks' constant is fitted to."""
    *_, dense = contenders
    if dense.model is None or times[-1] is None:
        return [None] * len(contenders)
    products = products_seconds(times[-1].shapes, times[-1].seconds)
    constant = block_constant(speeds[-1].step.median, products, _blocks(dense.model))
    found: list[Prediction | None] = []
    for one, own in zip(contenders, times, strict=True):
        if one.model is None or own is None:
            found.append(None)
            continue
        products = products_seconds(own.shapes, own.seconds)
        found.append(Prediction(own.rows, products, predicted_decode(products, _blocks(one.model), constant)))
    return found


def judged(
    contenders: Sequence[Contender], found: Sequence[ModelSpeed], shapes: Sequence[Counter[Shape]]
) -> list[ModelSpeed]:
    """With verdicts; the dense model is the last."""
    *models, dense = found
    dense_widths = _widths(shapes[-1])
    return [
        *(
            replace(one, verdict=tuple(verdict(_facts(one, dense, contender, _widths(own), dense_widths))))
            for one, contender, own in zip(models, contenders[:-1], shapes[:-1], strict=True)
        ),
        dense,
    ]


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products in a dtype, as far as this is known of it."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported()
    return product_dtype(device) == dtype


def _widths(shapes: Counter[Shape]) -> Widths:
    return frozenset(width for shape in shapes for width in shape)


def _blocks(model: PreTrainedModel) -> int:
    return int(model.config.num_hidden_layers)


def _facts(model: ModelSpeed, dense: ModelSpeed, contender: Contender, widths: Widths, dense_widths: Widths) -> Facts:
    one, other = model.batches[0], dense.batches[0]
    facts = Facts(model.name, prefill_ratio(one, other), decode_ratio(one, other), model.kernels)
    if contender.model is None:
        return facts
    prediction = model.predicted[0] if model.predicted else None
    return replace(
        facts,
        widths=widths,
        dense_widths=dense_widths,
        zeros=model.zeros or 0.0,
        dtype=model.dtype,
        dense_dtype=dense.dtype,
        device=contender.model.device.type,
        is_fast_dtype=is_fast(contender.model.dtype, contender.model.device),
        beside=None if prediction is None else 1 - prediction.products / one.step.median,
        flops=model.flops / dense.flops if model.flops and dense.flops else None,
    )
