"""What pruning costs: method x sparsity or pattern x seed on one model, as a table.

    python eval/pruning.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

Each result is measured in bf16 as stock transformers loads it. The figure is the rise of the mean log-perplexity over
the texts, and its share of what `sparsegpt` here loses. An arm is a method, or `method:key=value,...` with further
settings of the recipe, as in `slimlm:refit=false`.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml
from slicing import log_perplexities, mean, perplexities
from transformers import AutoTokenizer

import slimlm
from slimlm.compression import compress
from slimlm.evaluation.text import load_test_windows
from slimlm.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.7", "2:4"], help="sparsities and patterns")
    parser.add_argument("--arms", nargs="+", default=["magnitude", "wanda", "sparsegpt", "slimlm"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=256, help="to calibrate on, and of each text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-pruning"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [load_test_windows(text, tokenizer, arguments.windows, arguments.window).tokens for text in arguments.texts]
    dense = log_perplexities(Path(arguments.model), texts)
    print(f"dense: {perplexities(dense)}; slimlm {slimlm.__version__}", file=sys.stderr, flush=True)
    rows = [
        run(arguments, arm, amount, seed, texts, dense)
        for amount in arguments.amounts
        for arm in arguments.arms
        for seed in arguments.seeds
    ]
    report(arguments, rows)


def run(
    arguments: argparse.Namespace, arm: str, amount: str, seed: int, texts: list[torch.Tensor], dense: list[float]
) -> dict:
    method, _, settings = arm.partition(":")
    output = arguments.work / f"{method}-{seed}"
    more = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in settings.split(",") if pair)}
    recipe = Recipe(
        model=arguments.model, method=method, dataset=arguments.calibration, measure=False, seed=seed,
        num_calibration_samples=arguments.windows, max_seq_length=arguments.window, output_dir=str(output),
        **({"pattern": amount} if ":" in amount else {"sparsity": float(amount)}), **more,
    )  # fmt: skip
    start = time.perf_counter()
    manifest = compress(recipe, overwrite=True).manifest
    seconds = time.perf_counter() - start
    found = log_perplexities(output, texts)
    shutil.rmtree(output)
    row = {
        "arm": arm,
        "seed": seed,
        "amount": amount,
        "zeros": manifest["sparsity"]["zeros_in_pruned_matrices"],
        "perplexities": perplexities(found),
        "loss": sum(after - before for after, before in zip(found, dense, strict=True)) / len(dense),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def report(arguments: argparse.Namespace, rows: list[dict]) -> None:
    """A markdown table: per amount and arm, means over seeds."""
    names = " | ".join(Path(text).stem for text in arguments.texts)
    print(f"| zeros | arm | {names} | rise of log-perplexity | share of sparsegpt | seconds |")
    print(f"| --- | --- | {'--- | ' * len(arguments.texts)}--- | --- | --- |")
    for amount in arguments.amounts:
        reference = [row["loss"] for row in rows if row["arm"] == "sparsegpt" and row["amount"] == amount]
        for arm in arguments.arms:
            same = [row for row in rows if row["arm"] == arm and row["amount"] == amount]
            loss = mean([row["loss"] for row in same])
            spread = max(abs(row["loss"] - loss) for row in same)
            measured = " | ".join(
                f"{mean([row['perplexities'][text] for row in same]):.2f}" for text in range(len(arguments.texts))
            )
            share = f"{loss / mean(reference):.2f}" if reference else ""
            seconds = mean([row["seconds"] for row in same])
            print(f"| {amount} | {arm} | {measured} | {loss:.4f} ± {spread:.4f} | {share} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
