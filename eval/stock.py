"""Perplexities and greedy continuations of one checkpoint in stock transformers, fp32, where slimlm cannot be imported.

    python eval/stock.py DIR --texts a.txt b.txt --windows 64 --window 512

Prints one JSON object. Every document of a text is preceded by BOS (EOS where there is none); windows of that stream
of tokens are evenly spaced and do not overlap.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.modules["slimlm"] = None  # type: ignore[assignment]  # from here on `import slimlm` fails

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "To install the package, run the following command:",
    "Water boils at",
)
SEPARATOR = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    losses = {
        text.stem: log_perplexity(model, windows_of(text, tokenizer, arguments.windows, arguments.window))
        for text in arguments.texts
    }
    print(
        json.dumps(
            {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "log_perplexity": losses,
                "continuations": {prompt: continuation(model, tokenizer, prompt) for prompt in PROMPTS},
            }
        )
    )


def windows_of(text: Path, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """[count, length] tokens, evenly spaced over the text."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pool: list[int] = []
    for document in text.read_text(encoding="utf-8").split(f"\n{SEPARATOR}\n"):
        pool += [start, *tokenizer(document, add_special_tokens=False, verbose=False).input_ids]
    grid = torch.tensor(pool[: len(pool) // length * length]).view(-1, length)
    return grid[torch.arange(min(count, len(grid))) * len(grid) // min(count, len(grid))]


@torch.no_grad()
def log_perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean negative log-likelihood, in nats, of tokens 1.. of every window [n, time]."""
    total = 0.0
    for batch in windows.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"))
    loss = total / windows[:, 1:].numel()
    if not math.isfinite(loss):
        sys.exit("the loss is not finite")
    return loss


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """24 greedy tokens."""
    tokens = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
