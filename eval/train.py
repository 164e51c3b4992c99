"""Train a small model of a family from scratch, to compress later: random weights hide damage.

    python eval/train.py --family opt --corpus ../shared/corpus --steps 1500 --out /tmp/slimlm-trained/opt

The corpus is a folder with `tokenizer.json` (vocabulary of 4,096) and `train.u16.xz`, token ids as little-endian
16-bit numbers. Muon on the blocks' matrices, AdamW on the rest, warm-up, constant rate and a linear decay over the
last fifth of the time. 2 to 4 million parameters; on 2 CPU cores, some 6 million tokens in 20 minutes.
"""

import argparse
import lzma
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCABULARY, WINDOW = 4096, 256
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
CONFIGS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(
        hidden_size=192, ffn_dim=768, num_hidden_layers=5, num_attention_heads=6, max_position_embeddings=512,
        word_embed_proj_dim=192, dropout=0.0, **COMMON,
    ),
    "phi": PhiConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=5, num_attention_heads=6,
        max_position_embeddings=512, **COMMON,
    ),
    "qwen3": Qwen3Config(
        hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, max_position_embeddings=512, tie_word_embeddings=True, **COMMON,
    ),
}  # fmt: skip
RATES = {"muon": 0.02, "adamw": 4e-3}
WARM_UP, DECAY = 0.02, 0.2  # shares of the steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=CONFIGS)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokens = np.frombuffer(lzma.decompress((arguments.corpus / "train.u16.xz").read_bytes()), dtype="<u2")
    model = AutoModelForCausalLM.from_config(CONFIGS[arguments.family]).to(arguments.device)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(tokens):,} tokens of text")
    train(model, tokens, arguments)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(arguments.corpus / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(arguments.out)


def train(model: torch.nn.Module, tokens: np.ndarray, arguments: argparse.Namespace) -> None:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or ".layers." not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=RATES["muon"], weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=RATES["adamw"], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [RATES["muon"], RATES["adamw"]]
    generator = np.random.default_rng(arguments.seed)
    start, smooth = time.perf_counter(), float("nan")
    for step in range(1, arguments.steps + 1):
        done = step / (arguments.steps + 1)
        share = min(1.0, done / WARM_UP, (1 - done) / DECAY)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        places = generator.integers(0, len(tokens) - WINDOW, arguments.batch_size)
        batch = torch.from_numpy(np.stack([tokens[place : place + WINDOW] for place in places]).astype(np.int64))
        loss = model(input_ids=batch.to(arguments.device), labels=batch.to(arguments.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}, {time.perf_counter() - start:.0f} s, loss {smooth:.3f}", flush=True)


if __name__ == "__main__":
    main()
