"""What two processes of one thread reach together, against two independent runs of half the size side by side.

    python eval/scaling.py MODEL --dataset calibration.txt --text test.txt --windows 32 --what sparsegpt slice eval

Half the windows are given to each of the independent runs, which solve all there is to solve; the two processes share
windows and solves, and wait for each other. The independent runs' time over theirs is what sharing reaches: 1 is no
loss. Seconds are those of the work itself, without imports and checks. Nothing else may run on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}


def command(what: str, arguments: argparse.Namespace, windows: int, target: Path) -> list[str]:
    if what == "eval":
        return [
            "eval", arguments.model, "--tasks=none", f"--text={arguments.text}", f"--num-windows={windows}",
            f"--window={arguments.window}", f"--batch-size={arguments.batch_size}", f"--json={target}.json",
        ]  # fmt: skip
    sparsity = 0.25 if what == "slice" else 0.5
    return [
        "compress", f"--model={arguments.model}", f"--method={what}", f"--sparsity={sparsity}", "--no-measure",
        f"--dataset={arguments.dataset}", f"--num-calibration-samples={windows}",
        f"--max-seq-length={arguments.window}", f"--batch-size={arguments.batch_size}", f"--output-dir={target}",
        *(["--self-share=0", "--refine=0"] if what == "slice" else []),
    ]  # fmt: skip


def started(words: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "slimlm", *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def figures(what: str, target: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the work, and what each process says of itself."""
    if what == "eval":
        data = json.loads(target.with_suffix(".json").read_text())
        return sum(model["seconds"] for model in data["models"]), data["ranks"]
    run = json.loads((target / "slimlm.json").read_text())["run"]
    return run["seconds"]["compressing"], run["ranks"]


def compared(what: str, arguments: argparse.Namespace, place: Path) -> str:
    halves = [place / f"{what}-{number}" for number in range(2)]
    running = [started(command(what, arguments, arguments.windows // 2, half)) for half in halves]
    codes = [process.wait() for process in running]
    assert codes == [0, 0]
    apart = max(figures(what, half)[0] for half in halves)
    both = place / f"{what}-both"
    assert not started([*command(what, arguments, arguments.windows, both), "--num-processes=2"]).wait()
    together, ranks = figures(what, both)
    waited = " / ".join(f"{entry['seconds_exchanging'] / together:.1%}" for entry in ranks)
    moved = sum(entry["bytes_exchanged"] for entry in ranks) / len(ranks)
    return f"| {what} | {apart:.0f} | {together:.0f} | {apart / together:.2f} | {waited} | {moved / 1e6:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--what", nargs="+", default=["sparsegpt", "slice", "eval"])
    arguments = parser.parse_args()
    print("| | two halves, s | two processes, s | reached | exchanging, waiting included | MB exchanged, each |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for what in arguments.what:
            print(compared(what, arguments, Path(name)), flush=True)


if __name__ == "__main__":
    main()
