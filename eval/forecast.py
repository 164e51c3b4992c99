"""What --dry-run predicts against what the run then takes, at several shapes.

    python eval/forecast.py --work /tmp/forecast --flags="--no-refit --set weighting=none"

Prints a row per shape: peak memory (imports included) and seconds after imports, predicted and measured.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
from make_checkpoint import make

SHAPES = {  # hidden, mlp, heads, key/value heads, blocks
    "hidden 1024, mlp 2816, 24 blocks": (1024, 2816, 16, 4, 24),
    "hidden 2048, mlp 5632, 12 blocks": (2048, 5632, 16, 4, 12),
    "hidden 2560, mlp 6912, 8 blocks": (2560, 6912, 20, 5, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/slimlm-forecast"))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--flags", default="", help="further ones of `slimlm compress`")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokens = numpy.random.default_rng(0).integers(1, 4096, (arguments.windows, arguments.window))
    numpy.save(arguments.work / "tokens.npy", tokens)
    print("| shape | memory predicted, GB | measured | time predicted, s | measured |\n| --- | --- | --- | --- | --- |")
    for label, sizes in SHAPES.items():
        model = arguments.work / re.sub(r"\W+", "-", label)
        make(model, dict(zip(("hidden", "mlp", "heads", "kv-heads", "layers"), sizes, strict=True)))
        print(row(label, model, arguments), flush=True)


def row(label: str, model: Path, arguments: argparse.Namespace) -> str:
    output = arguments.work / "out"
    command = [
        sys.executable, "-m", "slimlm", "compress", "-m", str(model), "-s", "0.25", "--overwrite", "-o", str(output),
        "--dataset", str(arguments.work / "tokens.npy"), "--num-calibration-samples", str(arguments.windows),
        "--max-seq-length", str(arguments.window), "--batch-size", "4", "--eval-windows", "8",
        *arguments.flags.split(),
    ]  # fmt: skip
    dry = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout
    memory = float(dry.partition("peak memory: host ")[2].split()[0])
    seconds = float(dry.partition("time: ")[2].split()[0])
    subprocess.run(command, check=True, capture_output=True)
    run = json.loads((output / "slimlm.json").read_text())["run"]
    shutil.rmtree(output)
    peak, total = run["peak_memory_bytes"]["host"] / 1e9, run["seconds"]["total"]
    return (
        f"| {label} | {memory:.2f} | {peak:.2f} ({memory / peak - 1:+.0%}) | {seconds:.0f} "
        f"| {total:.0f} ({seconds / total - 1:+.0%}) |"
    )


if __name__ == "__main__":
    main()
