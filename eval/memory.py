"""Peak memory of a compression above what the imports take, for checkpoints of growing depth.

    python eval/memory.py --layers 8 15 30 --work /tmp/memory

Makes each checkpoint, compresses it in a process of its own, and prints a row: size on disk, peak resident memory
above imports, their ratio, what of a GPU's memory was taken where there is one, and seconds by stage. The shape of
Llama 3 8B is

    --layers 32 --hidden 4096 --mlp 14336 --heads 32 --kv-heads 8 --vocab 128256
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import yaml
from make_checkpoint import SHAPE, add_shape, make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 15, 30])
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-memory"))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--method", default="slice")
    add_shape(parser)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the recipe")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokens = numpy.random.default_rng(0).integers(1, arguments.vocab, (arguments.windows, arguments.window))
    numpy.save(arguments.work / "tokens.npy", tokens)
    print(
        f"| method | layers | checkpoint, GB | peak above imports, GB | share | GPU, GB | seconds |\n| {'--- | ' * 7}"
    )
    for layers in arguments.layers:
        print(row(arguments, layers), flush=True)


def row(arguments: argparse.Namespace, layers: int) -> str:
    sizes = {name: getattr(arguments, name.replace("-", "_")) for name in SHAPE}
    model = arguments.work / "-".join(["layers", str(layers), *map(str, sizes.values())])
    make(model, {"layers": layers, **sizes})
    more = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments.set)}
    recipe = {
        "model": str(model),
        "steps": [{"method": arguments.method, "sparsity": arguments.sparsity, **more}],
        "dataset": str(arguments.work / "tokens.npy"),
        "num_calibration_samples": arguments.windows,
        "max_seq_length": arguments.window,
        "batch_size": arguments.batch_size,
        "eval_windows": arguments.batch_size,
        "output_dir": str(arguments.work / "out"),
    }
    (arguments.work / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [
        sys.executable,
        "-m",
        "slimlm",
        "compress",
        "--recipe",
        str(arguments.work / "recipe.yaml"),
        "--overwrite",
    ]
    subprocess.run(command, check=True, capture_output=True)
    manifest = json.loads((arguments.work / "out" / "slimlm.json").read_text())
    shutil.rmtree(arguments.work / "out")
    size, run = manifest["bytes"]["dense"], manifest["run"]
    peak = run["peak_memory_bytes"]["host"] - run["memory_before_bytes"]
    gpu = run["peak_memory_bytes"].get("gpu", 0)
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in run["seconds"].items())
    return (
        f"| {arguments.method} {arguments.sparsity:g} | {layers} | {size / 1e9:.2f} | {peak / 1e9:.3f} "
        f"| {peak / size:.1%} | {gpu / 1e9:.2f} | {seconds} |"
    )


if __name__ == "__main__":
    main()
