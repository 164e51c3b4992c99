"""What pruning costs: method x sparsity or pattern x seed on one model, as a table.

    python eval/pruning.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

Each result is measured in bf16 as stock transformers loads it. The figure is the rise of the mean log-perplexity over
the texts, and its share of what `sparsegpt` here loses. An arm is a method, or `method:key=value,...` with further
settings of the recipe, as in `slimlm:refit=false`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml
from slicing import add_reference, mean, measured, measured_dense, parser_of, run_reference


def main() -> None:
    parser = parser_of(__doc__, Path("/tmp/slimlm-pruning"), [0])
    parser.add_argument("--amounts", nargs="+", default=["0.5", "0.7", "2:4"], help="sparsities and patterns")
    add_reference(parser, "directory that holds the published llama.py of SparseGPT")
    parser.add_argument("--arms", nargs="+", default=["magnitude", "wanda", "sparsegpt", "slimlm"])
    arguments = parser.parse_args()
    texts, dense = measured_dense(arguments)
    rows = [
        run(arguments, arm, amount, seed, texts, dense)
        for amount in arguments.amounts
        for arm in arguments.arms
        for seed in arguments.seeds
    ]
    if arguments.reference:
        rows += [
            published(arguments, amount, seed, texts, dense) for amount in arguments.amounts for seed in arguments.seeds
        ]
        arguments.arms.append("reference")
    report(arguments, rows)


def published(
    arguments: argparse.Namespace, amount: str, seed: int, texts: list[torch.Tensor], dense: list[float]
) -> dict:
    found = run_reference(arguments, "reference_sparsegpt.py", ["--amounts", amount], seed, texts, dense)
    return {**found, "arm": "reference"}


def run(
    arguments: argparse.Namespace, arm: str, amount: str, seed: int, texts: list[torch.Tensor], dense: list[float]
) -> dict:
    method, _, settings = arm.partition(":")
    output = arguments.work / f"{method}-{seed}"
    more = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in settings.split(",") if pair)}
    how_much = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    manifest, row = measured(arguments, output, {"method": method, **how_much, **more}, seed, texts, dense)
    row = {"arm": arm, "amount": amount, "zeros": manifest["sparsity"]["zeros_in_pruned_matrices"], **row}
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
