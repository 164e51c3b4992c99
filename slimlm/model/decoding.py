"""Token after token out of a model, and how long it takes: a prompt, then the model's own forward and its cache."""

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Taken:
    """Of one run of a batch: seconds until each sequence has its first token, seconds of every step after it, which
    gives each one token more, and bytes of memory at the peak, where they are known."""

    first: float
    steps: tuple[float, ...]
    memory: int | None = None

    @property
    def step(self) -> float:
        """Seconds of a step, the median: what interrupts a few of them does not count."""
        return statistics.median(self.steps)


class Generated(NamedTuple):
    """tokens: [batch, new], the likeliest each time. cached: bytes of keys and values (or states) in the end."""

    tokens: Tensor
    taken: Taken
    cached: int


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts: Tensor, new_tokens: int, clock: Clock = time.perf_counter) -> Generated:
    """The likeliest token, so many times, of prompts: [batch, time] without padding, on the model's device.

    A GPU has finished whenever the clock is read. Nothing ends a text early.
    """
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    finish(model.device)
    start = clock()
    out = model(input_ids=prompts, use_cache=True, **last)
    tokens = [out.logits[:, -1:].argmax(-1)]
    finish(model.device)
    times = [clock()]
    for _ in range(new_tokens - 1):
        out = model(input_ids=tokens[-1], use_cache=True, **last, **{name: out[name]})
        tokens.append(out.logits[:, -1:].argmax(-1))
        finish(model.device)  # as `generate` has it, which asks after every token whether that was the last
        times.append(clock())
    steps = tuple(after - before for before, after in pairwise(times))
    return Generated(torch.cat(tokens, 1), Taken(times[0] - start, steps), cached_bytes(out[name]))


def settle(model: nn.Module) -> None:
    """Have weights on a CPU where PyTorch puts tensors. transformers leaves them in the mapped file, at whatever
    address its header makes it, and products of those that are not aligned take longer: a matter of files, not of
    models."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def cached_bytes(cache: Cache) -> int:
    """Of all tensors that a cache's layers hold."""
    held = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    return sum(size_of(value) for value in held if isinstance(value, Tensor))


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor of any shape: of what it is made of, where that is several."""
    if tensor.layout == torch.sparse_bsr:
        return sum(map(size_of, (tensor.values(), tensor.crow_indices(), tensor.col_indices())))
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(size_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
