"""Mixtures of experts. A router reads the stream and is left as it is; each expert is pruned on the tokens it gets."""

from dataclasses import replace

from slimlm.families.family import Experts, Norm
from slimlm.families.llama import MISTRAL, QKV

ATTENTION = Norm("input_layernorm", QKV, ("self_attn.o_proj",))
EXPERTS = Experts("mlp.experts", reads="gate_up_proj", writes="down_proj")

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    norms=(ATTENTION, Norm("post_attention_layernorm", ("mlp.gate",), ())),
    mlp=None,
    experts=EXPERTS,
    unpruned=("mlp.gate",),
)
# Layers of `mlp_only_layers` have the MLP of a dense model in place of experts.
QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    norms=(
        ATTENTION,
        Norm("post_attention_layernorm", ("mlp.gate", "mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    ),
    inner=("self_attn.q_norm", "self_attn.k_norm"),
)
QWEN2_MOE = replace(
    MIXTRAL,
    model_type="qwen2_moe",
    norms=(
        ATTENTION,
        Norm(
            "post_attention_layernorm",
            (
                "mlp.gate",
                "mlp.shared_expert_gate",
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            ),
            ("mlp.shared_expert.down_proj", "mlp.down_proj"),
        ),
    ),
    unpruned=("mlp.gate", "mlp.shared_expert_gate"),
    matched=("mlp.shared_expert.down_proj",),
)
