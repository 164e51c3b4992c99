"""How long stock transformers takes: a prompt, then token after token by the model's own forward and its cache."""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from slimlm.device import forget_peak
from slimlm.model.decoding import Clock, Taken, greedy, size_of


class StockRunner:
    """A transformers model that is loaded, as `interleaved` runs it."""

    def __init__(self, model: PreTrainedModel, clock: Clock = time.perf_counter) -> None:
        self.model = model
        self.clock = clock

    @property
    def weights(self) -> int:
        """Bytes of weights in memory."""
        return sum(size_of(tensor) for tensor in (*self.model.parameters(), *self.model.buffers()))

    def run(self, prompts: Tensor, new_tokens: int) -> Taken:
        """prompts: [batch, time], on any device. On GPUs memory is what their allocator had given out at the peak, less
        what other models have there; on a CPU it is counted: weights, and the keys and values of the last token."""
        devices = devices_of(self.model)
        prompts = prompts.to(self.model.device)
        if devices[0].type != "cuda":
            found = greedy(self.model, prompts, new_tokens, self.clock)
            return replace(found.taken, memory=self.weights + found.cached)
        for device in devices:
            forget_peak(device)
        before = sum(map(torch.cuda.memory_allocated, devices))
        taken = greedy(self.model, prompts, new_tokens, self.clock).taken
        peak = sum(map(torch.cuda.max_memory_allocated, devices))
        return replace(taken, memory=self.weights + peak - before)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where its weights are, in their order; `meta` of those that are fetched when they are needed."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


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
