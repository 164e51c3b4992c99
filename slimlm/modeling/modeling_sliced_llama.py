"""A Llama whose residual stream changes basis and width between sublayers (SliceGPT, arXiv 2401.15024).

Self-contained: this file travels with the checkpoint and needs transformers only.
"""

from dataclasses import field
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding


class SlicedLlamaConfig(LlamaConfig):
    """stream_widths: the residual stream's width where each norm reads it, two for each layer and one for the head.

    hidden_size is the width before slicing, by which the norms still divide. head_dim must be given.
    """

    model_type = "sliced_llama"
    stream_widths: list[int] = field(default_factory=list)


class SlicedNorm(nn.Module):
    """x / sqrt(sum(x^2) / hidden_size + eps), without a gain: the sum runs over the directions that are left."""

    def __init__(self, config: SlicedLlamaConfig) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.variance_epsilon = config.rms_norm_eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(torch.float32)
        variance = x.pow(2).sum(-1, keepdim=True) / self.hidden_size
        return (x * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


def _linear(like: nn.Linear, inputs: int | None = None, outputs: int | None = None) -> nn.Linear:
    return nn.Linear(inputs or like.in_features, outputs or like.out_features, bias=like.bias is not None)


class SlicedLlamaDecoderLayer(LlamaDecoderLayer):
    """The shortcuts carry the residual stream from one basis into the next."""

    def __init__(self, config: SlicedLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        before, between, after = config.stream_widths[2 * layer_idx : 2 * layer_idx + 3]
        attention, mlp = self.self_attn, self.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, _linear(getattr(attention, name), inputs=before))
        attention.o_proj = _linear(attention.o_proj, outputs=between)
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, _linear(getattr(mlp, name), inputs=between))
        mlp.down_proj = _linear(mlp.down_proj, outputs=after)
        self.input_layernorm = SlicedNorm(config)
        self.post_attention_layernorm = SlicedNorm(config)
        self.attn_shortcut = nn.Linear(before, between, bias=False)
        self.mlp_shortcut = nn.Linear(between, after, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        written, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + written
        written = self.mlp(self.post_attention_layernorm(hidden_states))
        out: torch.Tensor = self.mlp_shortcut(hidden_states) + written
        return out


class SlicedLlamaModel(LlamaModel):
    config_class = SlicedLlamaConfig

    def __init__(self, config: SlicedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.stream_widths[0], self.padding_idx)
        self.layers = nn.ModuleList(SlicedLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = SlicedNorm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SlicedLlamaForCausalLM(LlamaForCausalLM):
    config_class = SlicedLlamaConfig

    def __init__(self, config: SlicedLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = SlicedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.stream_widths[-1], config.vocab_size, bias=False)
        self.post_init()
