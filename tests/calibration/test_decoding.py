"""Keys and values that stay where they are while a text is written."""

import torch
from transformers import AutoModelForCausalLM

from slimlm.calibration.decoding import Reserved, reserve
from tests.conftest import random_tokens
from tests.families.configs import family_config


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
