"""Peak memory of a compression above what the imports take, for checkpoints of growing depth.

    python eval/memory.py --layers 8 15 30 --work /tmp/memory

Makes each checkpoint, compresses it in a process of its own, and prints a row: size on disk, peak resident memory
above imports, their ratio, and seconds by stage.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy

RUN = """
import json, resource, sys
from slimlm.compression import compress
from slimlm.recipe import Recipe
import transformers.models.llama.modeling_llama
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
manifest = compress(Recipe(**json.loads(sys.argv[1])), overwrite=True).manifest
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"base": base, "peak": peak, "run": manifest["run"], "bytes": manifest["bytes"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15, 30])
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-memory"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--method", default="slice")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokens = numpy.random.default_rng(0).integers(1, 4096, (arguments.windows, arguments.window))
    numpy.save(arguments.work / "tokens.npy", tokens)
    print(f"| method | layers | checkpoint, GB | peak above imports, GB | share | seconds |\n| {'--- | ' * 6}")
    for layers in arguments.layers:
        print(row(arguments, layers), flush=True)


def row(arguments: argparse.Namespace, layers: int) -> str:
    model = arguments.work / f"layers-{layers}"
    if not model.exists():
        maker = Path(__file__).with_name("make_checkpoint.py")
        subprocess.run(
            [sys.executable, str(maker), str(model), "--layers", str(layers)], check=True, capture_output=True
        )
    recipe = {
        "model": str(model),
        "method": arguments.method,
        "sparsity": arguments.sparsity,
        "dataset": str(arguments.work / "tokens.npy"),
        "num_calibration_samples": arguments.windows,
        "max_seq_length": arguments.window,
        "batch_size": arguments.batch_size,
        "eval_windows": arguments.batch_size,
        "output_dir": str(arguments.work / "out"),
    }
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(recipe)], check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(arguments.work / "out")
    size, peak = figures["bytes"]["dense"], figures["peak"] - figures["base"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in figures["run"]["seconds"].items())
    return (
        f"| {arguments.method} {arguments.sparsity:g} | {layers} | {size / 1e9:.2f} | {peak / 1e9:.3f} "
        f"| {peak / size:.1%} | {seconds} |"
    )


if __name__ == "__main__":
    main()
