"""Perplexities, choices and greedy continuations of one checkpoint in stock transformers, fp32, where slimlm cannot be
imported.

    python eval/stock.py DIR --texts a.txt b.txt --windows 64 --window 512 --piqa piqa.jsonl --blimp blimp

Prints one JSON object. Every document of a text is preceded by BOS (EOS where there is none); windows of that stream
of tokens are evenly spaced and do not overlap. PIQA and BLiMP are lm-eval's questions, its prompts and its accuracy: of
two continuations the one with the larger sum of log-probabilities is chosen; a 1 or 0 stands for each question.
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
    parser.add_argument("--piqa", type=Path, help="piqa.jsonl: goal, sol1, sol2, label")
    parser.add_argument("--blimp", type=Path, help="directory of paradigms, .jsonl: sentence_good, sentence_bad")
    parser.add_argument("--trust-remote-code", action="store_true", help="for shapes that stock classes do not have")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loaded = {"dtype": torch.float32, "trust_remote_code": arguments.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **loaded).eval()
    losses = {
        text.stem: log_perplexity(model, windows_of(text, tokenizer, arguments.windows, arguments.window))
        for text in arguments.texts
    }
    print(
        json.dumps(
            {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "log_perplexity": losses,
                "right": {
                    name: "".join(str(int(right)) for right in chosen_right(model, tokenizer, pairs))
                    for name, pairs in questions(arguments.piqa, arguments.blimp).items()
                },
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


Pair = tuple[str, str, str]  # a prompt, its right continuation, and its wrong one


def questions(piqa: Path | None, blimp: Path | None) -> dict[str, list[Pair]]:
    """As lm-eval 0.4 asks them."""
    found: dict[str, list[Pair]] = {}
    if piqa is not None:
        found["piqa"] = []
        for line in piqa.read_text(encoding="utf-8").splitlines():
            asked = json.loads(line)
            answers = (" " + asked["sol1"], " " + asked["sol2"])
            right = answers[asked["label"]], answers[1 - asked["label"]]
            found["piqa"].append((f"Question: {asked['goal']}\nAnswer:", *right))
    if blimp is not None:
        lines = [
            line for path in sorted(blimp.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()
        ]
        found["blimp"] = [
            ("", *(" " + json.loads(line)[f"sentence_{kind}"] for kind in ("good", "bad"))) for line in lines
        ]
    return found


def chosen_right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair]) -> list[bool]:
    """Whether each pair's right continuation is likelier than the wrong one."""
    asked = [encoded(tokenizer, prompt, text) for prompt, *texts in pairs for text in texts]
    order = sorted(range(len(asked)), key=lambda index: len(asked[index][0]))
    sums = torch.zeros(len(asked))
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        sums[some] = log_likelihoods(model, [asked[index] for index in some])
    return [bool(right > wrong) for right, wrong in sums.view(-1, 2)]


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], int]:
    """Tokens of a prompt and what follows it, and how many of them are the prompt's: without one BOS, or EOS, is it."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not prompt:
        return [start, *tokenizer(text, add_special_tokens=False).input_ids], 1
    whole, before = (tokenizer(asked, add_special_tokens=False).input_ids for asked in (prompt + text, prompt))
    return whole, len(before)


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, asked: list[tuple[list[int], int]]) -> Tensor:
    """Of what follows each prompt, summed over its tokens: [n]."""
    longest = max(len(tokens) for tokens, _ in asked)
    batch, counts = torch.zeros(len(asked), longest, dtype=torch.long), torch.zeros(len(asked), longest)
    for row, (tokens, prompt) in enumerate(asked):
        batch[row, : len(tokens)] = torch.tensor(tokens)
        counts[row, prompt : len(tokens)] = 1
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # what is padded on the right is not seen
    losses = cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
    return -(losses * counts[:, 1:]).sum(1)


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """24 greedy tokens."""
    tokens = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
