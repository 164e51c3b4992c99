"""Tiny models of every kind of block, with a tokenizer of single characters, and data for them."""

import zlib
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.configs import SETTINGS, SIZED

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:'\n-"
VOCABULARY = 64
LLAMAS = {
    "llama": SIZED,
    "llama tied": {**SIZED, "tie_word_embeddings": True},
    "mistral": {**SIZED, "sliding_window": 8},
}
SENTENCES = (
    "The old house stood at the end of the lane, and nobody had lived there.",
    "Once the ships came in; now the harbour is quiet, and grass grows between stones.",
    "She counted the windows twice - there were more of them than rooms.",
)


def tiny_config(name: str) -> PretrainedConfig:
    settings = {**SETTINGS, **LLAMAS}[name]
    return CONFIG_MAPPING[name.partition(" ")[0]](**{**settings, "vocab_size": VOCABULARY})


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every character, 0 for what begins and ends a text."""
    known = {"<s>": 0, "<unk>": 1} | {character: number for number, character in enumerate(CHARACTERS, 2)}
    whole = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="<s>", unk_token="<unk>")


def build(name: str, path: Path) -> Path:
    """A random model of this name whose gains and biases are not the trivial ones; a parameter's values hang on its
    name alone."""
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            chance = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            if "norm" in key or "ln_" in key:
                parameter.uniform_(0.5, 1.5, generator=chance)
            else:
                parameter.normal_(std=0.1 if key.endswith("bias") else 0.15, generator=chance)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write_data(place: Path) -> None:
    """Calibration tokens, of which some are much more frequent than others, and a text."""
    chance = numpy.random.default_rng(0)
    shares = 1 / numpy.arange(1, VOCABULARY + 1)
    numpy.save(place / "tokens.npy", chance.choice(VOCABULARY, (40, 32), p=shares / shares.sum()))
    order = chance.integers(0, len(SENTENCES), 60)
    (place / "text.txt").write_text(" ".join(SENTENCES[number] for number in order))
