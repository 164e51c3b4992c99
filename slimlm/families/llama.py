"""Sequential pre-norm blocks with RMSNorm and a gated MLP: Llama and those that followed it."""

from dataclasses import replace

from slimlm.families.family import Axis, Carrier, Family, Norm

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED_MLP = Axis(("intermediate_size",), rows=("mlp.gate_proj", "mlp.up_proj"), columns=("mlp.down_proj",))
GROUPS = Axis(("num_key_value_heads", "num_attention_heads"), rows=QKV, columns=("self_attn.o_proj",))
ATTENTION = Norm("input_layernorm", QKV, ("self_attn.o_proj",))
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

# What `basis: per-block` makes of a model is known so that it can be measured; its norms have no gains.
PER_BLOCK = "it has a basis for every block already"

LLAMA = Family(
    model_type="llama",
    blocks="model.layers",
    embeddings=("model.embed_tokens",),
    norms=(ATTENTION, Norm("post_attention_layernorm", GATED_MLP.rows, GATED_MLP.columns)),
    final_norm="model.norm",
    head="lm_head",
    norm_eps="rms_norm_eps",
    mlp=GATED_MLP,
    groups=GROUPS,
    heads="num_attention_heads",
    # Its config wants hidden_size to be a multiple of the heads, and some programs take the size of a head from that. A
    # Mistral without a sliding window is the same model with a head_dim of its own.
    carrier=Carrier("mistral", {"sliding_window": None}, unless=("attention_bias", "mlp_bias")),
)

SLICED_LLAMA = replace(
    LLAMA, model_type="sliced_llama", heads=None, carrier=None, mlp=None, groups=None, why_not=PER_BLOCK
)
MISTRAL = replace(LLAMA, model_type="mistral", heads=None, carrier=None)
# vLLM's Qwen2 derives the size of heads from hidden_size; a Llama with attention biases is the same model.
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    carrier=Carrier(
        "llama", {"attention_bias": True}, zeros=("self_attn.o_proj.bias",), unless=("use_sliding_window",)
    ),
)
QWEN3 = replace(MISTRAL, model_type="qwen3", inner=QK_NORMS)
SMOLLM3 = replace(MISTRAL, model_type="smollm3")
GRANITE = replace(
    MISTRAL,
    model_type="granite",
    residual_scale="residual_multiplier",
    logit_divisor="logits_scaling",
)
GEMMA = replace(MISTRAL, model_type="gemma", offset=1.0, scaled_by_width=True)
PHI3 = replace(
    MISTRAL,
    model_type="phi3",
    norms=(
        Norm("input_layernorm", readers=("self_attn.qkv_proj",), writers=("self_attn.o_proj",)),
        Norm("post_attention_layernorm", readers=("mlp.gate_up_proj",), writers=("mlp.down_proj",)),
    ),
    mlp=Axis(
        ("intermediate_size",),
        rows=("mlp.gate_up_proj",),
        columns=("mlp.down_proj",),
        stacks=(("mlp.gate_up_proj", ("intermediate_size", "intermediate_size")),),
    ),
    groups=None,  # the class splits queries, keys and values by its config, which a block being fitted is not like yet
)
