"""What transformers 5 makes of a checkpoint in fp32, where slimlm cannot be imported, for clients to be compared with.

    python eval/client/reference.py MODEL OUT.npz TEXT

Prompts are tokens, so that tokenizers do not confound the logits; what the tokenizer makes of texts is kept beside
them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from comparison import trusts
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is Paris, and the river that flows through the middle of it to the sea is",
    "Once upon a time there was a little girl who lived with 3 brothers in a village at the edge of",
)
TEXTS = (
    *PROMPTS,
    "def f(x):\n    return x+1  # 100%\n\n\n\ttabs, and 12345.678 numbers",
    "Straße, naïve, 東京 and Привет; it's, we'll, DON'T — “quoted”  \n",
)
LENGTH, GREEDY = 20, 24
WINDOWS, WINDOW = 8, 128


def main() -> None:
    sys.modules["slimlm"] = None  # type: ignore[assignment]
    model, out, text = (Path(argument) for argument in sys.argv[1:])
    torch.manual_seed(0)
    own = trusts(model)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=own)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=own).eval()
    prompts = [encoded(tokenizer, prompt)[:LENGTH] for prompt in PROMPTS]
    logits = {f"logits{index}": logits_of(network, prompt) for index, prompt in enumerate(prompts)}
    end = network.generation_config.eos_token_id
    facts = {
        "prompts": prompts,
        "greedy": greedy(network, prompts[0]),
        "ends": end if isinstance(end, list) else [] if end is None else [end],
        "texts": TEXTS,
        "tokens": [encoded(tokenizer, one) for one in TEXTS],
    }
    numpy.savez(out, facts=json.dumps(facts), windows=windows_of(tokenizer, text), **logits)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@torch.no_grad()
def logits_of(network: PreTrainedModel, tokens: list[int]) -> Any:
    return network(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def greedy(network: PreTrainedModel, tokens: list[int]) -> list[int]:
    """24 tokens, the whole text computed anew for each."""
    text = list(tokens)
    for _ in range(GREEDY):
        text.append(int(logits_of(network, text)[-1].argmax()))
    return text[len(tokens) :]


def windows_of(tokenizer: PreTrainedTokenizerBase, text: Path) -> Any:
    """[windows, time] tokens from the beginning of a file."""
    tokens = encoded(tokenizer, text.read_text(encoding="utf-8")[: WINDOWS * WINDOW * 8])
    return numpy.array(tokens[: WINDOWS * WINDOW], dtype=numpy.int64).reshape(-1, WINDOW)


if __name__ == "__main__":
    main()
