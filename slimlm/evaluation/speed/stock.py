"""How long stock transformers takes: a prompt, then token after token by the model's own forward and its cache."""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from slimlm.device import forget_peak
from slimlm.evaluation.speed.timing import Clock, Taken


class Generated(NamedTuple):
    """tokens: [batch, new], the likeliest each time. cached: bytes of keys and values (or states) in the end."""

    tokens: Tensor
    taken: Taken
    cached: int


class StockRunner:
    """A transformers model that is loaded, as `interleaved` runs it."""

    def __init__(self, model: PreTrainedModel, clock: Clock = time.perf_counter) -> None:
        self.model = model
        self.clock = clock

    @property
    def weights(self) -> int:
        """Bytes of weights in memory."""
        return sum(_bytes(tensor) for tensor in (*self.model.parameters(), *self.model.buffers()))

    def run(self, prompts: Tensor, new_tokens: int) -> Taken:
        """prompts: [batch, time], on any device. On a GPU memory is what its allocator had given out at the peak, less
        what other models have there; on a CPU it is counted: weights, and the keys and values of the last token."""
        device = self.model.device
        prompts = prompts.to(device)
        if device.type != "cuda":
            found = greedy(self.model, prompts, new_tokens, self.clock)
            return replace(found.taken, memory=self.weights + found.cached)
        forget_peak(device)
        before = torch.cuda.memory_allocated(device)
        taken = greedy(self.model, prompts, new_tokens, self.clock).taken
        return replace(taken, memory=self.weights + torch.cuda.max_memory_allocated(device) - before)


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
    return sum(_bytes(value) for value in held if isinstance(value, Tensor))


@torch.inference_mode()
def flops_per_token(model: PreTrainedModel, prompts: Tensor) -> float:
    """Floating-point operations for each token of prompts: [batch, time], two a multiplication, as a prompt is read:
    the head sees the last token only. Attention is counted in full, as if it looked ahead."""
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    with FlopCounterMode(display=False, custom_mapping=dict(_uncounted())) as counted:
        model(input_ids=prompts.to(model.device), use_cache=True, **last)
    return float(counted.get_total_flops() / prompts.numel())


def zeros_in(model: nn.Module) -> float:
    """Share of zeros in the matrices of its linears."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))


def _uncounted() -> Iterator[tuple[torch._ops.OpOverloadPacket, Callable[..., int]]]:
    """Operators that PyTorch does not count, where they are there, and what they take by the shapes they get."""
    if attention := getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None):
        yield attention, lambda query, key, value, *_, **__: int(sdpa_flop_count(query, key, value))
    if experts := getattr(torch.ops.aten, "_grouped_mm", None):  # [tokens, in], [experts, in, out]
        yield experts, lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[-1]


def _bytes(tensor: Tensor) -> int:
    """Of what it is made of, where that is several tensors."""
    if tensor.layout == torch.sparse_bsr:
        return sum(map(_bytes, (tensor.values(), tensor.crow_indices(), tensor.col_indices())))
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
