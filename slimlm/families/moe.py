"""Mixtures of experts. A router reads the stream and is left as it is; each expert is pruned on the tokens it gets."""

from dataclasses import replace

from slimlm.families.family import Axis, Experts, Norm
from slimlm.families.llama import ATTENTION, MISTRAL, QK_NORMS

EXPERTS = Experts("mlp.experts", reads="gate_up_proj", writes="down_proj")
EXPERTS_MLP = Axis(("moe_intermediate_size",), rows=("mlp.experts.gate_up_proj",), columns=("mlp.experts.down_proj",))

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    norms=(ATTENTION, Norm("post_attention_layernorm", ("mlp.gate",), ())),
    mlp=replace(EXPERTS_MLP, config=("intermediate_size",)),
    experts=EXPERTS,
    unpruned=("mlp.gate",),
)
# Layers of `mlp_only_layers` have the MLP of a dense model in place of experts.
QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    mlp=EXPERTS_MLP,
    norms=(
        ATTENTION,
        Norm("post_attention_layernorm", ("mlp.gate", "mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    ),
    inner=QK_NORMS,
)
QWEN2_MOE = replace(
    MIXTRAL,
    model_type="qwen2_moe",
    mlp=EXPERTS_MLP,
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
