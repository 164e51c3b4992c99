"""Blocks with LayerNorm, which subtracts the mean, and biases: sequential or parallel.

Heads are no axis where the class splits its queries by the number of heads in its config: while a block is fitted it
still has all of them. Nor are they with alibi, whose slopes go by that number.
"""

from dataclasses import replace
from typing import Any

from slimlm.families.family import Axis, Carrier, Family, Norm
from slimlm.families.llama import ATTENTION, GATED_MLP, MISTRAL, PER_BLOCK, QKV

STARCODER2 = replace(
    MISTRAL,
    model_type="starcoder2",
    norms=(
        ATTENTION,
        Norm("post_attention_layernorm", ("mlp.c_fc",), ("mlp.c_proj",)),
    ),
    norm_eps="norm_epsilon",
    centred=True,
    mlp=Axis(("intermediate_size",), rows=("mlp.c_fc",), columns=("mlp.c_proj",)),
)
QK_NORM = "its norms of queries and keys have the size that hidden_size gives them"
PHI = replace(
    MISTRAL,
    model_type="phi",
    norms=(Norm("input_layernorm", (*QKV, "mlp.fc1"), ("self_attn.dense", "mlp.fc2")),),
    final_norm="model.final_layernorm",
    norm_eps="layer_norm_eps",
    parallel=True,
    centred=True,
    mlp=Axis(("intermediate_size",), rows=("mlp.fc1",), columns=("mlp.fc2",)),
    groups=Axis(("num_key_value_heads", "num_attention_heads"), rows=QKV, columns=("self_attn.dense",)),
    inner=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    variants=(({"qk_layernorm": True}, {"groups": None, "why_not": QK_NORM}),),
)
STABLELM_PARALLEL = {
    "norms": (Norm("input_layernorm", QKV + GATED_MLP.rows, ATTENTION.writers + GATED_MLP.columns),),
    "parallel": True,
}
STABLELM = replace(
    MISTRAL,
    model_type="stablelm",
    norm_eps="layer_norm_eps",
    centred=True,
    groups=None,
    inner=PHI.inner,
    carrier=Carrier("narrow_stablelm", stock=False),
    variants=(
        (
            {"use_parallel_residual": True, "qk_layernorm": True},
            {**STABLELM_PARALLEL, "why_not": QK_NORM},
        ),
        ({"qk_layernorm": True}, {"why_not": QK_NORM}),
        ({"use_parallel_residual": True}, STABLELM_PARALLEL),
    ),
)
UP, DOWN = ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)
GPT_NEOX = Family(
    model_type="gpt_neox",
    blocks="gpt_neox.layers",
    embeddings=("gpt_neox.embed_in",),
    norms=(
        Norm("input_layernorm", ("attention.query_key_value",), ("attention.dense",)),
        Norm("post_attention_layernorm", UP, DOWN),
    ),
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    norm_eps="layer_norm_eps",
    centred=True,
    mlp=Axis(("intermediate_size",), rows=UP, columns=DOWN),
    groups=Axis(("num_attention_heads",), rows=("attention.query_key_value",), columns=("attention.dense",)),
    carrier=Carrier("narrow_gpt_neox", stock=False),
    variants=(({"use_parallel_residual": True}, {"parallel": True}),),
)
GPT2 = Family(
    model_type="gpt2",
    blocks="transformer.h",
    embeddings=("transformer.wte", "transformer.wpe"),
    norms=(
        Norm("ln_1", ("attn.c_attn",), ("attn.c_proj",)),
        Norm("ln_2", ("mlp.c_fc",), ("mlp.c_proj",)),
    ),
    final_norm="transformer.ln_f",
    head="lm_head",
    norm_eps="layer_norm_epsilon",
    centred=True,
    mlp=Axis(("n_inner",), rows=("mlp.c_fc",), columns=("mlp.c_proj",)),
    carrier=Carrier("narrow_gpt2", stock=False),
    variants=(({"scale_attn_by_inverse_layer_idx": True}, {"numbered": True}),),
)
OPT = Family(
    model_type="opt",
    blocks="model.decoder.layers",
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    norms=(
        Norm("self_attn_layer_norm", QKV, ("self_attn.out_proj",)),
        Norm("final_layer_norm", ("fc1",), ("fc2",)),
    ),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    norm_eps="",
    centred=True,
    mlp=Axis(("ffn_dim",), rows=("fc1",), columns=("fc2",)),
    outer=("model.decoder.project_in", "model.decoder.project_out"),
    carrier=Carrier("narrow_opt", stock=False),
    variants=(
        (
            {"do_layer_norm_before": False},
            {
                "norms": (Norm("", QKV, ("self_attn.out_proj",)), Norm("", ("fc1",), ("fc2",))),
                "inner": ("self_attn_layer_norm", "final_layer_norm"),
                "final_norm": "",
                "matched": ("self_attn.out_proj", "fc2"),
                "why_not": "this one (OPT-350m) normalises the residual stream itself after each sum",
            },
        ),
        (
            {"_remove_final_layer_norm": True},
            {"final_norm": "", "why_not": "this one has no norm before its head"},
        ),
    ),
)
FUSED, DENSE = ("self_attention.query_key_value",), ("self_attention.dense",)
ONE_NORM = (Norm("input_layernorm", FUSED + UP, DENSE + DOWN),)
TWO_NORMS = (Norm("input_layernorm", FUSED, DENSE), Norm("post_attention_layernorm", UP, DOWN))
# The newer of its three layouts has a norm each for attention and MLP, the older one for both or a sequential block.
FALCON = replace(
    GPT2,
    model_type="falcon",
    embeddings=("transformer.word_embeddings",),
    norms=(Norm("ln_attn", FUSED, DENSE), Norm("ln_mlp", UP, DOWN)),
    parallel=True,
    tuples=True,
    mlp=Axis(("ffn_hidden_size",), rows=UP, columns=DOWN),
    carrier=Carrier("narrow_falcon", stock=False),
    variants=(
        ({"new_decoder_architecture": False, "parallel_attn": False}, {"norms": TWO_NORMS, "parallel": False}),
        ({"new_decoder_architecture": False}, {"norms": ONE_NORM}),
        ({"num_ln_in_parallel_attn": 1}, {"norms": ONE_NORM}),
    ),
)
BLOOM = replace(
    FALCON,
    model_type="bloom",
    norms=TWO_NORMS,
    parallel=False,
    alibi=True,
    embedding_norm="transformer.word_embeddings_layernorm",
    mlp=Axis(("ffn_dim",), rows=UP, columns=DOWN),
    carrier=Carrier("narrow_bloom", stock=False, mlp=True),
    variants=(
        (
            {"apply_residual_connection_post_layernorm": True},
            {"matched": DENSE + DOWN, "why_not": "what its blocks write is added to what their norms give"},
        ),
    ),
)

# What slicing makes of those whose class derives the size of heads from hidden_size.
NARROW = (
    replace(OPT, model_type="narrow_opt", norm_eps="layer_norm_eps", carrier=None),
    *(
        replace(family, model_type=f"narrow_{family.model_type}", carrier=None)
        for family in (GPT2, GPT_NEOX, STABLELM, FALCON)
    ),
    replace(
        BLOOM,
        model_type="narrow_bloom",
        carrier=None,
        variants=(*BLOOM.variants, ({"embedding_norm": False}, {"embedding_norm": None})),
    ),
)
_SLICED: dict[str, Any] = {
    "mlp": None,
    "groups": None,
    "carrier": None,
    "centred": False,
    "why_not": PER_BLOCK,
    "variants": (),
}
SLICED = (replace(OPT, model_type="sliced_opt", **_SLICED), replace(PHI, model_type="sliced_phi", **_SLICED))
