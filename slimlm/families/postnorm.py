"""Blocks that normalise what they write before they add it: no rotation passes such a norm, so hidden_size stays."""

from dataclasses import replace

from slimlm.families.family import Norm
from slimlm.families.llama import ATTENTION, GATED_MLP, MISTRAL, QK_NORMS

WHY_NOT = "its norms on what blocks write do not commute with a rotation of the residual stream"
WRITERS = ("self_attn.o_proj", "mlp.down_proj")

GEMMA2 = replace(
    MISTRAL,
    model_type="gemma2",
    norms=(
        replace(ATTENTION, after="post_attention_layernorm"),
        Norm("pre_feedforward_layernorm", GATED_MLP.rows, GATED_MLP.columns, after="post_feedforward_layernorm"),
    ),
    matched=WRITERS,
    offset=1.0,
    scaled_by_width=True,
    why_not=WHY_NOT,
)
GEMMA3_TEXT = replace(GEMMA2, model_type="gemma3_text", inner=QK_NORMS)
# No norm stands before the readers: they see the stream as it is. The norms of queries and keys span all heads.
OLMO2 = replace(
    MISTRAL,
    model_type="olmo2",
    norms=(
        replace(ATTENTION, name="", after="post_attention_layernorm"),
        Norm("", GATED_MLP.rows, GATED_MLP.columns, after="post_feedforward_layernorm"),
    ),
    groups=None,
    inner=QK_NORMS,
    matched=WRITERS,
    why_not=WHY_NOT,
)
