"""Attention of transformers' models as CPUs do it fast: of one query, and of windows in bf16.

PyTorch's is a kernel of its own there. Matrix products and a softmax take a half to two thirds of its time for windows
and their gradients, and a tenth for one query.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from slimlm.linalg.attention import causal, one_query

NAME = "slimlm-cpu"
SDPA = "sdpa"
LONGEST = 512  # tokens of windows; those of twice as many take as long in PyTorch's kernel
OTHERS = ("softcap", "s_aux", "position_bias")  # what changes scores and is known to PyTorch's function alone

Setting = Tensor | float | None


def attend_fast(model: PreTrainedModel) -> None:
    """Have a model attend with what is here, if it takes such functions; it computes what it did. GPUs have better."""
    takes_it = model._supports_attention_backend and model._can_set_attn_implementation()
    if model.device.type != "cuda" and takes_it and model.config._attn_implementation == SDPA:
        _register()
        model.set_attn_implementation(NAME)


@contextmanager
def attending_fast(model: PreTrainedModel) -> Iterator[None]:
    """The same inside."""
    before = model.config._attn_implementation
    try:
        attend_fast(model)
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@cache
def _register() -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[SDPA])


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Setting
) -> tuple[Tensor, None]:
    """Softmax attention as transformers' functions have it: query [batch, heads, queries, size], keys and values
    [batch, groups, time, size], mask [batch, 1, queries, time] -> [batch, queries, heads, size]."""
    others = any(settings.get(name) is not None for name in OTHERS)
    alone = others or settings.get("dropout") or query.device.type != "cpu"  # a model's own may be meta
    scaling, grouped = settings.get("scaling"), query.unflatten(1, (key.shape[1], -1))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if not alone and query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
        out = one_query(grouped.squeeze(-2), key, value, attention_mask, scale).unsqueeze(-2)
    elif not alone and attention_mask is None and _is_causal(module, query, key, settings) and _pays(query):
        dtype = _dtype(query)
        out = causal(grouped.to(dtype), key.to(dtype), value.to(dtype), scale)
    else:
        found: tuple[Tensor, None] = AttentionInterface()[SDPA](module, query, key, value, attention_mask, **settings)
        return found
    return out.flatten(1, 2).transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, query: Tensor, key: Tensor, settings: Mapping[str, Setting]) -> bool:
    """Whether, without a mask, every token sees those up to it."""
    said = settings.get("is_causal")
    return query.shape[2] == key.shape[2] and bool(getattr(module, "is_causal", True) if said is None else said)


def _pays(query: Tensor) -> bool:
    """Whether PyTorch's kernel takes longer."""
    return 1 < query.shape[2] <= LONGEST and _dtype(query) == torch.bfloat16


def _dtype(query: Tensor) -> torch.dtype:
    """Of products."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
