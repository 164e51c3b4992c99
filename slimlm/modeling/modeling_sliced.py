"""Llama, OPT and Phi whose residual stream changes basis and width between sublayers (SliceGPT, arXiv 2401.15024).

Self-contained: this file travels with the checkpoint and needs transformers only, 4.57 or newer, and 5 for OPT and Phi.
"""

from dataclasses import field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTLearnedPositionalEmbedding
from transformers.models.phi.modeling_phi import PhiDecoderLayer

RELEASE = int(transformers.__version__.partition(".")[0])


def _require_release_5(model: nn.Module) -> None:
    if RELEASE < 5:
        raise ImportError(
            f"{type(model).__name__} needs transformers 5 or newer, and this is {transformers.__version__}: "
            "pip install --upgrade transformers"
        )


class SlicedLlamaConfig(LlamaConfig):
    """stream_widths: the residual stream's width where each norm reads it, two for each layer and one for the head.

    hidden_size is the width before slicing, by which the norms still divide. head_dim must be given.
    """

    model_type = "sliced_llama"
    stream_widths: list[int] = field(default_factory=list)


class SlicedOPTConfig(OPTConfig):
    """stream_widths: as in a sliced Llama. The mean is subtracted from all that is written, not by the norms."""

    model_type = "sliced_opt"
    stream_widths: list[int] = field(default_factory=list)


class SlicedPhiConfig(PhiConfig):
    """stream_widths: one for each layer, whose attention and MLP read the same, and one for the head."""

    model_type = "sliced_phi"
    stream_widths: list[int] = field(default_factory=list)


class SlicedNorm(nn.Module):
    """x / sqrt(sum(x^2) / hidden_size + eps), without a gain: the sum runs over the directions that are left."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [..., width]."""
        x = hidden_states.to(torch.float32)
        variance = x.pow(2).sum(-1, keepdim=True) / self.hidden_size
        return (x * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


def _resize(module: nn.Module, names: str, inputs: int | None = None, outputs: int | None = None) -> None:
    for name in names.split():
        like = getattr(module, name)
        linear = nn.Linear(inputs or like.in_features, outputs or like.out_features, bias=like.bias is not None)
        setattr(module, name, linear)


class SlicedLlamaDecoderLayer(LlamaDecoderLayer):
    """The shortcuts carry the residual stream from one basis into the next."""

    def __init__(self, config: SlicedLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        before, between, after = config.stream_widths[2 * layer_idx : 2 * layer_idx + 3]
        _resize(self.self_attn, "q_proj k_proj v_proj", inputs=before)
        _resize(self.self_attn, "o_proj", outputs=between)
        _resize(self.mlp, "gate_proj up_proj", inputs=between)
        _resize(self.mlp, "down_proj", outputs=after)
        self.input_layernorm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_shortcut = nn.Linear(before, between, bias=False)
        self.mlp_shortcut = nn.Linear(between, after, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: [batch, time, width before] -> [batch, time, width after]."""
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
        self.norm = SlicedNorm(config.hidden_size, config.rms_norm_eps)
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


class SlicedOPTDecoderLayer(OPTDecoderLayer):
    def __init__(self, config: SlicedOPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        before, between, after = config.stream_widths[2 * layer_idx : 2 * layer_idx + 3]
        _resize(self.self_attn, "q_proj k_proj v_proj", inputs=before)
        _resize(self.self_attn, "out_proj", outputs=between)
        _resize(self, "fc1", inputs=between)
        _resize(self, "fc2", outputs=after)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            setattr(self, name, SlicedNorm(config.hidden_size, getattr(self, name).eps))
        self.attn_shortcut = nn.Linear(before, between, bias=False)
        self.mlp_shortcut = nn.Linear(between, after, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: [batch, time, width before] -> [batch, time, width after]."""
        written, _ = self.self_attn(hidden_states=self.self_attn_layer_norm(hidden_states), **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + written
        written = self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))
        out: torch.Tensor = self.mlp_shortcut(hidden_states) + written
        return out


class SlicedOPTForCausalLM(OPTForCausalLM):
    """The head has a bias: that of the final norm goes there."""

    config_class = SlicedOPTConfig

    def __init__(self, config: SlicedOPTConfig) -> None:
        _require_release_5(self)
        super().__init__(config)
        decoder, first, last = self.model.decoder, config.stream_widths[0], config.stream_widths[-1]
        decoder.embed_tokens = nn.Embedding(config.vocab_size, first, config.pad_token_id)
        decoder.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, first)
        decoder.layers = nn.ModuleList(SlicedOPTDecoderLayer(config, index) for index in range(len(decoder.layers)))
        decoder.final_layer_norm = SlicedNorm(config.hidden_size, decoder.final_layer_norm.eps)
        self.lm_head = nn.Linear(last, config.vocab_size, bias=True)


class SlicedPhiDecoderLayer(PhiDecoderLayer):
    def __init__(self, config: SlicedPhiConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        before, after = config.stream_widths[layer_idx : layer_idx + 2]
        _resize(self.self_attn, "q_proj k_proj v_proj", inputs=before)
        _resize(self.self_attn, "dense", outputs=after)
        _resize(self.mlp, "fc1", inputs=before)
        _resize(self.mlp, "fc2", outputs=after)
        self.input_layernorm = SlicedNorm(config.hidden_size, config.layer_norm_eps)
        self.shortcut = nn.Linear(before, after, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """hidden_states: [batch, time, width before] -> [batch, time, width after]."""
        normalised = self.input_layernorm(hidden_states)
        written, _ = self.self_attn(hidden_states=normalised, **kwargs)
        out: torch.Tensor = written + self.mlp(normalised) + self.shortcut(hidden_states)
        return out


class SlicedPhiForCausalLM(PhiForCausalLM):
    config_class = SlicedPhiConfig

    def __init__(self, config: SlicedPhiConfig) -> None:
        _require_release_5(self)
        super().__init__(config)
        model, first, last = self.model, config.stream_widths[0], config.stream_widths[-1]
        model.embed_tokens = nn.Embedding(config.vocab_size, first, config.pad_token_id)
        model.layers = nn.ModuleList(SlicedPhiDecoderLayer(config, index) for index in range(len(model.layers)))
        model.final_layernorm = SlicedNorm(config.hidden_size, config.layer_norm_eps)
        self.lm_head = nn.Linear(last, config.vocab_size, bias=True)
