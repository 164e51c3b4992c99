"""Attention of one query, and draws, as fast as CPUs do them, and the same as PyTorch's."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from slimlm.calibration import decoding
from slimlm.calibration.decoding import NAME, Reserved, decode_fast, one_query, reserve
from tests.conftest import random_tokens
from tests.families.configs import SETTINGS, family_config


@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("cached", [1, 170, 1 << 20])
def test_one_query_attends_as_pytorch_does(
    masked: str | None, scaling: float | None, cached: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoding, "CACHED", cached)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 4)
    mask = torch.rand(3, 1, 1, 5) < 0.7
    mask[..., 0] = True
    added = torch.zeros(3, 1, 1, 5).masked_fill(~mask, -1e9)
    given = {None: None, "bool": mask, "added": added}[masked]
    found, _ = one_query(nn.Module(), query, key, value, given, scaling=scaling, dropout=0.0)
    repeated = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)
    wanted = scaled_dot_product_attention(query, *repeated, attn_mask=given, scale=scaling)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_several_queries_go_to_pytorch():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8) for _ in range(3))
    found, _ = one_query(nn.Module(), query, key, value, None, scaling=8**-0.5)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_family_writes_what_it_wrote(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name)).float().eval()
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        decode_fast(model)
        cache, logits = None, []
        known = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        for column in tokens.split(1, 1):
            out = model(input_ids=column, use_cache=True, **{known: cache})
            if cache is None:
                reserve(out[known], tokens.shape[1])
            cache = out[known]
            logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-4)


def test_keys_and_values_are_written_into_memory_that_is_there():
    model = AutoModelForCausalLM.from_config(family_config("qwen2")).float().eval()
    tokens = random_tokens(2, 6)
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :2], use_cache=True).cache
        plain = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        reserve(cache, 6)
        assert all(type(layer) is Reserved for layer in cache.layers)
        assert all(
            torch.equal(mine, own)
            for layer, both in zip(cache.layers, plain, strict=True)
            for mine, own in zip((layer.keys, layer.values), both, strict=True)
        )
        places = {layer.keys.data_ptr() for layer in cache.layers}
        for column in tokens[:, 2:].split(1, 1):
            model(input_ids=column, use_cache=True, cache=cache)
        assert cache.get_seq_length() == 6
        assert {layer.keys.data_ptr() for layer in cache.layers} == places


def test_a_llama_is_one_that_takes_it():
    model = AutoModelForCausalLM.from_config(family_config("qwen2"))
    decode_fast(model)
    assert model.config._attn_implementation == NAME
