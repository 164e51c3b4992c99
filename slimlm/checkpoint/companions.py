"""What belongs to a model beside its config and weights: fetched with it, and handed on with what is made of it."""

# Tokenizer, chat template, generation settings and licence travel with the weights, byte for byte.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
