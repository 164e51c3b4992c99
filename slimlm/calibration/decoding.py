"""What writing a text token by token spends its time on, made fast: attention of one query on CPUs, and keys and values
that are not copied.

PyTorch's attention of a single query in bf16 takes most of the time of a small model's decoding there; matrix products
in fp32 take a fraction of it.
"""

from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

NAME = "slimlm-one-query"
CACHED = 1 << 19  # keys at a time, in fp32: what stays in a cache
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
    query = query.reshape(batch, groups, heads // groups, size).float() * (size**-0.5 if scaling is None else scaling)
    rows = max(1, CACHED // key[0].numel())
    masks = [None] * batch if attention_mask is None else attention_mask.expand(batch, -1, -1, -1).split(rows)
    parts = zip(query.split(rows), key.split(rows), value.split(rows), masks, strict=False)
    out = torch.cat([_attended(*part) for part in parts])
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Of some of the batch, [batch, groups, heads of a group, size]. In fp32: oneDNN, which has bf16's products, would
    keep code for every length there is."""
    scores = query @ key.float().transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value.float()).to(value.dtype)


def reserve(cache: Cache, length: int) -> None:
    """Have a cache that has begun go on in memory for so many tokens, where it keeps them all."""
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer:
            cache.layers[number] = Reserved(layer, length)


class Reserved(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values that are written where they belong: transformers' are copied, all of them, for every token."""

    def __init__(self, begun: DynamicLayer, length: int) -> None:
        super().__init__()
        self.length = length
        self.update(begun.keys, begun.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Tensor, **settings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All that there are, [batch, groups, time, size], with new ones behind."""
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.room = [one.new_empty(*one.shape[:2], self.length, one.shape[3]) for one in new]
            self.filled = 0
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        for room, one in zip(self.room, new, strict=True):
            room[:, :, start : self.filled] = one
        self.keys, self.values = (room[:, :, : self.filled] for room in self.room)
        return self.keys, self.values
