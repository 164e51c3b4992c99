"""How long a model's decoding takes on this machine, and products of shapes that it may get, in the same conditions."""

import statistics
import time
from collections.abc import Mapping

import torch

from slimlm.device import return_freed_memory
from slimlm.model.decoding import greedy, settle
from slimlm.model.shape_times import MOST_BYTES, Shape, ShapeTimes, StepTimes
from slimlm.model.streamed import StreamedModel

ROUNDS = 7  # the first of which warms up
TURN = 64 * 2**20  # bytes of weights that a shape goes through in a round
PROMPT, NEW = 32, 9  # tokens: what attention takes is hardly any of a step then


def step_times(model: StreamedModel, shapes: Mapping[Shape, int], dtype: torch.dtype) -> StepTimes:
    """Steps of one token and products of each shape in turns; medians.

    As many of the first blocks take part as make up MOST_BYTES, at least one, beside the embedding and the head.
    shapes: and how often the model has each, 0 for those it has not. dtype: to compute in. Time is the
    processor's where one thread of a CPU computes, which other programs do not slow down.
    """
    own = StreamedModel(model.checkpoint, model.config, model.device, dtype, model.trust_remote_code)
    count = _leave_first(own)
    alone = model.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    prompt = torch.arange(PROMPT, device=model.device)[None] % model.config.vocab_size
    times, steps = ShapeTimes(shapes, 1, dtype, model.device, clock, TURN), []
    with own.loaded([*own.outside, *map(own.family.block, range(count))]):
        settle(own.model)
        for _ in range(ROUNDS):
            steps.append(greedy(own.model, prompt, NEW, clock).taken.step)
            times.measure()
    found = StepTimes(statistics.median(steps[1:]), count, times.seconds)
    del times
    return_freed_memory()
    return found


def _leave_first(model: StreamedModel) -> int:
    """Take all blocks out of a model but some of the first ones: how many those are."""
    size = model.dtype.itemsize * sum(tensor.numel() for tensor in model.blocks[0].module.state_dict().values())
    count = min(len(model.blocks), max(1, int(MOST_BYTES // size)))
    owner, _, name = model.family.blocks.rpartition(".")
    setattr(model.model.get_submodule(owner), name, model.model.get_submodule(model.family.blocks)[:count])
    return count
