"""What writing a text token by token spends its time on, as CPUs do it fast: attention of one query, and a draw.

PyTorch's attention of a single query in bf16, and its multinomial draw, take most of the time of a small model's
decoding there; matrix products in fp32, and sums, take a fraction of it.
"""

from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "slimlm-one-query"
SDPA = "sdpa"


def decode_fast(model: PreTrainedModel) -> None:
    """Have a model attend with `one_query`, if it takes such functions; it computes what it did. GPUs have better."""
    if model.device.type != "cuda" and model._supports_attention_backend and model.config._attn_implementation == SDPA:
        _register()
        model.set_attn_implementation(NAME)


@cache
def _register() -> None:
    AttentionInterface.register(NAME, one_query)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[SDPA])


def one_query(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Tensor | float | None,
) -> tuple[Tensor, None]:
    """Softmax attention as transformers' functions have it: query [batch, heads, 1, size], keys and values
    [batch, groups, time, size], mask [batch, 1, 1, time] -> [batch, 1, heads, size]. More than that is PyTorch's."""
    (batch, heads, queries, size), groups = query.shape, key.shape[1]
    more = any(settings.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if queries > 1 or more or (attention_mask is not None and attention_mask.shape[1] > 1):
        found: tuple[Tensor, None] = AttentionInterface()[SDPA](module, query, key, value, attention_mask, **settings)
        return found
    scaling = settings.get("scaling")
    # In fp32: oneDNN, which has bf16's products, would keep code for every length there is.
    scores = query.reshape(batch, groups, heads // groups, size).float() @ key.float().transpose(-1, -2)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if is_bool else scores + attention_mask
    out = scores.softmax(-1) @ value.float()
    return out.to(value.dtype).reshape(batch, 1, heads, value.shape[-1]), None


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One of each row's outcomes: [rows, outcomes] -> [rows, 1]. By where a uniform number falls among their sums."""
    sums = probabilities.cumsum(-1)
    place = sums[:, -1:] * torch.rand(len(sums), 1, generator=generator, device=sums.device)
    return (sums <= place).sum(-1, keepdim=True).clamp_max(sums.shape[-1] - 1)
