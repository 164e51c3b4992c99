"""What slicing and pruning cost models of several families, as a table.

    for family in opt phi qwen3; do
        python eval/train.py --family $family --corpus ../shared/corpus --out /tmp/slimlm-trained/$family
    done
    python eval/families.py --models /tmp/slimlm-trained/* --calibration ../shared/data/calibration.txt \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

Each model is sliced by 10% and 25% of all its parameters, by slimlm and, where it has a modelling file for the family,
by SliceGPT as published; and pruned to 50% and 2:4 by SparseGPT and by slimlm. Results are measured in bf16.
"""

import argparse
import json
import sys
from pathlib import Path

from slicing import mean, measured, measured_dense, parser_of, perplexities
from transformers import AutoConfig

from slimlm.errors import UserError
from slimlm.slice.per_block import CONFIGS

ARMS: dict[str, dict] = {
    "slice 10%, SliceGPT": {"sparsity": 0.1, "basis": "per-block", "round_to": 1},
    "slice 10%, slimlm": {"sparsity": 0.1},
    "slice 25%, SliceGPT": {"sparsity": 0.25, "basis": "per-block", "round_to": 1},
    "slice 25%, slimlm": {"sparsity": 0.25},
    "prune 50%, SparseGPT": {"method": "sparsegpt", "sparsity": 0.5},
    "prune 50%, slimlm": {"method": "slimlm", "sparsity": 0.5},
    "prune 2:4, SparseGPT": {"method": "sparsegpt", "pattern": "2:4"},
    "prune 2:4, slimlm": {"method": "slimlm", "pattern": "2:4"},
}


def main() -> None:
    parser = parser_of(__doc__, Path("/tmp/slimlm-families"), [0], several=True)
    arguments = parser.parse_args()
    names = " | ".join(Path(text).stem for text in arguments.texts)
    print(f"| model | | parameters removed | {names} | rise of log-perplexity | result | seconds |")
    print(f"| --- | --- | --- | {'--- | ' * len(arguments.texts)}--- | --- | --- |")
    for model in arguments.models:
        table(arguments, model)


def table(arguments: argparse.Namespace, model: str) -> None:
    arguments.model = model
    texts, dense = measured_dense(arguments)
    family = AutoConfig.from_pretrained(model).model_type
    values = " | ".join(f"{value:.2f}" for value in perplexities(dense))
    print(f"| {family} | dense | | {values} | | | |", flush=True)
    for arm, settings in ARMS.items():
        if settings.get("basis") and family not in CONFIGS:
            continue
        try:
            found = [
                measured(arguments, arguments.work / family, settings, seed, texts, dense) for seed in arguments.seeds
            ]
        except UserError as error:
            print(f"| {family} | {arm} | {error} | {'| ' * len(arguments.texts)} | | |", flush=True)
            continue
        rows = [row for _, row in found]
        print(json.dumps({"model": family, "arm": arm, "rows": rows}), file=sys.stderr, flush=True)
        values = " | ".join(
            f"{mean([row['perplexities'][text] for row in rows]):.2f}" for text in range(len(arguments.texts))
        )
        removed = mean([manifest["sparsity"]["parameters_removed"] for manifest, _ in found])
        loss, seconds = mean([row["loss"] for row in rows]), mean([row["seconds"] for row in rows])
        widths = ", ".join(sorted({str(manifest["method"]["widths"]) for manifest, _ in found if "sparsity" in settings
                                   and manifest["method"].get("widths")}))  # fmt: skip
        print(f"| {family} | {arm} | {removed:.1%} | {values} | {loss:.4f} | {widths} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
