"""Is the split that slicing chooses a good one? Every split of a grid is refitted and measured.

    python eval/splits.py --model ../shared/models/llama-6m --calibration ../shared/data/calibration.txt \
        --texts ../shared/data/books_test.txt ../shared/data/docs_test.txt

The grid is every `--stride`-th of the splits that remove the requested share of the parameters, all numbers of blocks
and key/value groups among them, and the chosen one. The figure is the rise of the mean log-perplexity over the texts.
"""

import json
import sys
from pathlib import Path

import torch
from slicing import CLOSED, measured, measured_dense, parser_of

from slimlm.models import open_model
from slimlm.recipe import SliceStep
from slimlm.slice.candidates import candidates
from slimlm.slice.shapes import Shapes
from slimlm.slice.widths import Layout


def main() -> None:
    parser = parser_of(__doc__, Path("/tmp/slimlm-splits"), [0])
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--stride", type=int, default=2)
    arguments = parser.parse_args()
    texts, dense = measured_dense(arguments)
    shapes = Shapes(Layout(open_model(Path(arguments.model), torch.device("cpu"), "fast")))
    splits = candidates(shapes, SliceStep(model=arguments.model, sparsity=arguments.sparsity))
    seed = arguments.seeds[0]
    manifest, row = measured(arguments, arguments.work, {"sparsity": arguments.sparsity, **CLOSED}, seed, texts, dense)
    chosen = manifest["method"]["widths"]
    print(f"| split | removed | rise of log-perplexity |\n| --- | --- | --- |\n| {chosen}, chosen | "
          f"{manifest['sparsity']['parameters_removed']:.1%} | {row['loss']:.4f} |", flush=True)  # fmt: skip
    losses = [row["loss"]]
    for split in splits[:: arguments.stride]:
        if str(split) != chosen:
            manifest, row = measured(arguments, arguments.work, {"widths": str(split), **CLOSED}, seed, texts, dense)
            print(json.dumps({"split": str(split), **row}), file=sys.stderr, flush=True)
            removed = manifest["sparsity"]["parameters_removed"]
            print(f"| {split} | {removed:.1%} | {row['loss']:.4f} |", flush=True)
            losses.append(row["loss"])
    print(f"\n{len(losses)} of {len(splits)} splits; the chosen one is {losses[0] / min(losses):.3f} times the best")


if __name__ == "__main__":
    main()
