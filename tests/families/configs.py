"""A tiny config for every family and layout of blocks, each with the sizes that tell axes apart."""

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TOKENS = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
HEADS = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
PLAIN = {**HEADS, "intermediate_size": 48}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
SIZED = {**GROUPED, "head_dim": 8}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FALCON = {key: value for key, value in HEADS.items() if key != "max_position_embeddings"}
BLOOM = {**TOKENS, "hidden_size": 32, "n_layer": 3, "n_head": 4}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
OPT = {**HEADS, "ffn_dim": 48, "word_embed_proj_dim": 32}
SETTINGS: dict[str, dict] = {
    "qwen2": GROUPED,
    "qwen2 sliding": {**GROUPED, **MIXED, "use_sliding_window": True},
    "qwen3": SIZED,
    "qwen3 tied": {**SIZED, "tie_word_embeddings": True},
    "phi3": {**GROUPED, "sliding_window": 8},
    "granite": {**GROUPED, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "smollm3": GROUPED,
    "gemma": {**SIZED, "tie_word_embeddings": False},
    "gemma2": {**SIZED, "sliding_window": 8},
    "gemma3_text": {**SIZED, **MIXED},
    "olmo2": GROUPED,
    "starcoder2": {**GROUPED, "sliding_window": 8, "tie_word_embeddings": False},
    "stablelm": {**GROUPED, "use_qkv_bias": True, "tie_word_embeddings": False},
    "stablelm parallel": {**GROUPED, "use_parallel_residual": True, "tie_word_embeddings": False},
    "stablelm normed": {**GROUPED, "qk_layernorm": True},
    "phi": GROUPED,
    "phi normed": {**GROUPED, "qk_layernorm": True},
    "gpt_neox": PLAIN,
    "gpt_neox sequential": {**PLAIN, "use_parallel_residual": False},
    "gpt2": {**GPT2, "tie_word_embeddings": False},
    "gpt2 tied": GPT2,
    "opt": {**OPT, "tie_word_embeddings": False},
    "opt tied": OPT,
    "opt post-norm": {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "falcon": FALCON,
    "falcon heads": {**FALCON, "multi_query": False, "tie_word_embeddings": False},
    "falcon new": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    "falcon one norm": {
        **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1,
    },
    "falcon alibi": {**FALCON, "alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    "falcon new alibi": {**FALCON, "alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": BLOOM,
    "bloom untied": {**BLOOM, "tie_word_embeddings": False},
    "bloom post-norm": {**BLOOM, "apply_residual_connection_post_layernorm": True},
    "mixtral": {**GROUPED, "num_local_experts": 4, "sliding_window": 8},
    "qwen2_moe": {**SIZED, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**SIZED, **EXPERTS, "mlp_only_layers": [1]},
}  # fmt: skip


def family_config(name: str) -> PretrainedConfig:
    return CONFIG_MAPPING[name.partition(" ")[0]](**SETTINGS[name])
