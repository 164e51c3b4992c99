"""What computing in a checkpoint's own dtype costs, as GPUs do it, beside the float32 of a CPU.

    python eval/precision.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt

Prints perplexities on the bundled text, of the dense model and of what each way of computing makes of it.
"""

import argparse
import json
import tempfile

import slimlm.check
from slimlm.recipe import one_step
from slimlm.stages import compress

ARMS = (
    {"sparsity": 0.25},
    {"method": "slimlm", "sparsity": 0.5},
    {"method": "slimlm", "pattern": "2:4"},
    {"method": "slimlm", "sparsity": 0.5, "allocation": "solved"},
    {"method": "sparsegpt", "sparsity": 0.5},
    {"method": "mfac", "sparsity": 0.5},
    {"basis": "per-block", "sparsity": 0.25},
)
open_model = slimlm.check.open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--windows", type=int, default=64)
    arguments = parser.parse_args()
    print("| | dense | float32 | its own dtype |\n| --- | --- | --- | --- |")
    for arm in ARMS:
        dense, full = perplexities(arguments, arm, "fast")
        _, own = perplexities(arguments, arm, "stock")
        print(f"| {json.dumps(arm)[1:-1]} | {dense:.2f} | {full:.2f} | {own:.2f} |", flush=True)


def perplexities(arguments: argparse.Namespace, arm: dict[str, object], precision: str) -> tuple[float, float]:
    slimlm.check.open_model = lambda path, device, _, *more: open_model(path, device, precision, *more)
    with tempfile.TemporaryDirectory() as folder:
        recipe = one_step(
            model=arguments.model, dataset=arguments.calibration, num_calibration_samples=arguments.windows,
            max_seq_length=256, device="cpu", output_dir=f"{folder}/out", **arm,
        )  # fmt: skip
        measured = compress(recipe).manifest["measured"]
    return measured["dense"]["perplexity"], measured["compressed"]["perplexity"]


if __name__ == "__main__":
    main()
