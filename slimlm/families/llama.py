"""Llama and Mistral: sequential pre-norm blocks, RMSNorm, gated MLP, grouped-query attention, `head_dim` honoured."""

from dataclasses import replace

from slimlm.families.family import Axis, Family, Norm

LLAMA = Family(
    model_type="llama",
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    norms=(
        Norm(
            "input_layernorm",
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            writers=("self_attn.o_proj",),
        ),
        Norm("post_attention_layernorm", readers=("mlp.gate_proj", "mlp.up_proj"), writers=("mlp.down_proj",)),
    ),
    final_norm="model.norm",
    head="lm_head",
    norm_eps="rms_norm_eps",
    mlp=Axis(("intermediate_size",), rows=("mlp.gate_proj", "mlp.up_proj"), columns=("mlp.down_proj",)),
    groups=Axis(
        ("num_key_value_heads", "num_attention_heads"),
        rows=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        columns=("self_attn.o_proj",),
    ),
    heads="num_attention_heads",
)

# What `basis: per-block` makes of a Llama: known so that it can be measured; its norms have no gains.
SLICED_LLAMA = replace(LLAMA, model_type="sliced_llama", heads=None, mlp=None, groups=None)
MISTRAL = replace(LLAMA, model_type="mistral", heads=None)
