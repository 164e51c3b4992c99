"""OPT, GPT-2, GPT-NeoX, StableLM, Falcon and BLOOM whose residual stream is narrower than their heads together.

The stock classes derive the size of a head from hidden_size; these have it as `head_dim`, and are otherwise the stock
ones. Self-contained: this file travels with the checkpoint and needs transformers only, 4.57 or newer, and 5 for GPT-2
and StableLM.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.pytorch_utils import Conv1D

RELEASE = int(transformers.__version__.partition(".")[0])


def _name_head_as_in_files() -> None:
    """transformers 5 calls GPT-NeoX's head by another name than files do, in classes that it knows of."""
    if RELEASE < 5:
        return
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    if names := get_checkpoint_conversion_mapping("GPTNeoXForCausalLM"):
        register_checkpoint_conversion_mapping("NarrowGPTNeoXForCausalLM", names, overwrite=True)


def _require_release_5(model: nn.Module) -> None:
    if RELEASE < 5:
        raise ImportError(
            f"{type(model).__name__} needs transformers 5 or newer, and this is {transformers.__version__}: "
            "pip install --upgrade transformers"
        )


class NarrowOPTConfig(OPTConfig):
    """head_dim: size of a head. layer_norm_eps: epsilon of the norms, which the stock class has as a constant."""

    model_type = "narrow_opt"
    head_dim: int = 64
    layer_norm_eps: float = 1e-5


class NarrowGPT2Config(GPT2Config):
    model_type = "narrow_gpt2"
    head_dim: int = 64


class NarrowGPTNeoXConfig(GPTNeoXConfig):
    model_type = "narrow_gpt_neox"
    head_dim: int = 64

    def validate_architecture(self) -> None:
        """Heads need not divide hidden_size."""


class NarrowStableLmConfig(StableLmConfig):
    model_type = "narrow_stablelm"
    head_dim: int = 64


class NarrowFalconConfig(FalconConfig):
    model_type = "narrow_falcon"
    head_dim: int = 64


class NarrowBloomConfig(BloomConfig):
    """ffn_dim: width of the MLP. embedding_norm: whether embeddings go through a norm; rotated ones have been."""

    model_type = "narrow_bloom"
    head_dim: int = 64
    ffn_dim: int = 256
    embedding_norm: bool = True


@contextmanager
def _one_head(config: PretrainedConfig) -> Iterator[tuple[int, int]]:
    """Inside, the stock classes find heads that divide hidden_size; their real number, and their width together."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    config.num_attention_heads = 1
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = 1
    try:
        yield heads, heads * config.head_dim
    finally:
        config.num_attention_heads = heads
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = groups or heads


def _resize(module: nn.Module, names: str, inputs: int, outputs: int) -> None:
    for name in names.split():
        like = getattr(module, name)
        setattr(module, name, type(like)(inputs, outputs, bias=like.bias is not None))


class NarrowOPTForCausalLM(OPTForCausalLM):
    config_class = NarrowOPTConfig

    def __init__(self, config: NarrowOPTConfig) -> None:
        with _one_head(config) as (heads, width):
            super().__init__(config)
        for layer in self.model.decoder.layers:
            attention = layer.self_attn
            attention.num_heads, attention.head_dim = heads, config.head_dim
            attention.scaling = config.head_dim**-0.5
            _resize(attention, "q_proj k_proj v_proj", config.hidden_size, width)
            _resize(attention, "out_proj", width, config.hidden_size)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = config.layer_norm_eps


class NarrowGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = NarrowGPT2Config

    def __init__(self, config: NarrowGPT2Config) -> None:
        _require_release_5(self)
        with _one_head(config) as (heads, width):
            super().__init__(config)
        for layer in self.transformer.h:
            attention = layer.attn
            attention.scaling *= (config.head_dim / attention.head_dim) ** -0.5 if config.scale_attn_weights else 1.0
            attention.num_heads, attention.head_dim, attention.split_size = heads, config.head_dim, width
            attention.c_attn = Conv1D(3 * width, config.hidden_size)
            attention.c_proj = Conv1D(config.hidden_size, width)


class NarrowGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    config_class = NarrowGPTNeoXConfig

    def __init__(self, config: NarrowGPTNeoXConfig) -> None:
        _name_head_as_in_files()
        with _one_head(config) as (_, width):
            super().__init__(config)
        for layer in self.gpt_neox.layers:
            attention = layer.attention
            attention.head_size, attention.scaling = config.head_dim, config.head_dim**-0.5
            attention.rotary_ndims = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
            _resize(attention, "query_key_value", config.hidden_size, 3 * width)
            _resize(attention, "dense", width, config.hidden_size)


class NarrowStableLmForCausalLM(StableLmForCausalLM):
    config_class = NarrowStableLmConfig

    def __init__(self, config: NarrowStableLmConfig) -> None:
        _require_release_5(self)
        with _one_head(config) as (heads, width):
            super().__init__(config)
        groups = config.num_key_value_heads
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.num_heads, attention.num_key_value_heads = heads, groups
            attention.num_key_value_groups = heads // groups
            attention.head_dim, attention.scaling = config.head_dim, config.head_dim**-0.5
            attention.rotary_ndims = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
            _resize(attention, "q_proj", config.hidden_size, width)
            _resize(attention, "k_proj v_proj", config.hidden_size, groups * config.head_dim)
            _resize(attention, "o_proj", width, config.hidden_size)


class NarrowFalconForCausalLM(FalconForCausalLM):
    config_class = NarrowFalconConfig

    def __init__(self, config: NarrowFalconConfig) -> None:
        with _one_head(config) as (heads, width):
            super().__init__(config)
        self.transformer.num_heads = heads
        if config.alibi:  # divides by the square root of a head's size, which it derives from these
            self.transformer.config = copy.copy(config)
            self.transformer.config.hidden_size = width
        for layer in self.transformer.h:
            attention = layer.self_attention
            attention.num_heads, attention.head_dim, attention.split_size = heads, config.head_dim, width
            attention.beta = attention.inv_norm_factor = config.head_dim**-0.5
            outputs = width + 2 * attention.num_kv_heads * config.head_dim
            _resize(attention, "query_key_value", config.hidden_size, outputs)
            _resize(attention, "dense", width, config.hidden_size)


class NarrowBloomForCausalLM(BloomForCausalLM):
    config_class = NarrowBloomConfig

    def __init__(self, config: NarrowBloomConfig) -> None:
        with _one_head(config) as (heads, width):
            super().__init__(config)
        self.transformer.num_heads = heads
        if not config.embedding_norm:
            self.transformer.word_embeddings_layernorm = nn.Identity()
        for layer in self.transformer.h:
            attention = layer.self_attention
            attention.num_heads, attention.head_dim = heads, config.head_dim
            attention.hidden_size = attention.split_size = width
            attention.inv_norm_factor = config.head_dim**-0.5
            _resize(attention, "query_key_value", config.hidden_size, 3 * width)
            _resize(attention, "dense", width, config.hidden_size)
            _resize(layer.mlp, "dense_h_to_4h", config.hidden_size, config.ffn_dim)
            _resize(layer.mlp, "dense_4h_to_h", config.ffn_dim, config.hidden_size)
