"""Programs in which sliced models were tried, by architecture, for the model card: what `eval/clients.py` found, with
random models of each. Of architectures that were not tried nothing is said."""

NEWER, PEFT = "transformers 5.24", "PEFT 0.21"
TRANSFORMERS = ("transformers 4.57", NEWER, PEFT)
LLAMA_CPP, MLX, CT2 = "llama.cpp (ggml 0.25)", "mlx-lm 0.32", "CTranslate2 4.8"
ONNX, VLLM = "onnxruntime-genai 0.18", "vLLM 0.32"
EVERY = (*TRANSFORMERS, VLLM, LLAMA_CPP, MLX, CT2, ONNX)
# By the result's model_type, but "qwen2" for a Llama made of one: those that gave the same logits and tokens.
READ_BY: dict[str, tuple[str, ...]] = {
    "llama": EVERY,
    "mistral": EVERY,
    "qwen3": EVERY,
    "qwen2": tuple(program for program in EVERY if program != CT2),  # a Llama with biases once it is narrower
    "mixtral": (*TRANSFORMERS, VLLM, LLAMA_CPP),
    "granite": (*TRANSFORMERS, VLLM, ONNX),
    "phi3": (*TRANSFORMERS, VLLM),
    "gemma2": (NEWER, PEFT, VLLM, MLX),
    "narrow_opt": TRANSFORMERS,
    "narrow_gpt_neox": TRANSFORMERS,
    "narrow_gpt2": (NEWER, PEFT),
}
HEADS = "the size of a head from hidden_size, which a narrower stream no longer gives"
OWN = "it is a class of its own, with its code in the checkpoint: other programs do not know it"
# And why others did not, where the dense model is one that they read.
UNREAD = {
    "qwen2": f"CTranslate2 takes {HEADS}",
    "mixtral": f"mlx-lm takes {HEADS}",
    "granite": f"mlx-lm and llama.cpp take {HEADS}",
    "phi3": f"mlx-lm takes {HEADS}",
    "narrow_opt": OWN,
    "narrow_gpt_neox": OWN,
    "narrow_gpt2": f"{OWN}, and transformers 4 would compute something else",
}


def programs_line(model_type: str, is_narrower: bool) -> str:
    """A sentence for the card of a result. is_narrower: whether its stream or its heads are."""
    read = READ_BY.get(model_type)
    if read is None:
        return ""
    why = f" Not in others: {UNREAD[model_type]}." if is_narrower and model_type in UNREAD else ""
    return f"Sliced `{model_type}` models were tried in {', '.join(read[:-1])} and {read[-1]}: the same logits.{why}"
