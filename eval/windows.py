"""Does the refit ever lose to no refit? Slices of one width with more and more calibration windows.

    python eval/windows.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt \\
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

The figure is the rise of the mean log-perplexity over the texts.
"""

import argparse
from pathlib import Path

from slicing import CLOSED, measured, measured_dense, parser_of


def main() -> None:
    parser = parser_of(__doc__, Path("/tmp/slimlm-windows"), [0])
    parser.add_argument("--widths", default="hidden=192")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    arguments = parser.parse_args()
    texts, dense = measured_dense(arguments)
    print(f"| windows | {arguments.widths}, no refit | refit |\n| --- | --- | --- |")
    for count in arguments.counts:
        without, refitted = (loss(arguments, count, refit, texts, dense) for refit in (False, True))
        print(f"| {count} | {without:.4f} | {refitted:.4f} |", flush=True)


def loss(arguments: argparse.Namespace, count: int, refit: bool, texts: list, dense: list[float]) -> float:
    arguments.windows = count
    _, row = measured(
        arguments,
        arguments.work,
        {"widths": arguments.widths, "refit": refit, **(CLOSED if refit else {})},
        arguments.seeds[0],
        texts,
        dense,
    )
    return float(row["loss"])


if __name__ == "__main__":
    main()
