"""Kill a compression at random instants, resume it, and compare the result with an undisturbed run's.

    python eval/kill.py --kills 20 --seed 0
    python eval/kill.py --kills 20 --seed 0 --several

Every run is the real command line on the bundled model. A row per kill: the instant, how far the run had come, whether
anything stood under the output's name, and whether the resumed run's weights, config and tokenizer are the same bytes.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMED = ("slimlm.json", "slimlm.log.jsonl", "README.md", "recipe.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--several", action="store_true", help="kill a recipe of three runs: pruning in three shots")
    arguments = parser.parse_args()
    if arguments.several:
        FLAGS.extend(["--method=sparsegpt", "--set=shots=3", "-s=0.6"])
    else:
        FLAGS.append("-s=0.25")
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        undisturbed(place)  # warms the file cache, or the timed run would look longer than the killed ones
        reference, began, ended = undisturbed(place)
        same = 0
        print("| kill at, s | last finished step | under the name | resumed, bytes |\n| --- | --- | --- | --- |")
        for _ in range(arguments.kills):
            same += kill_once(place, chance.uniform(began, ended), reference)
        print(f"{same} of {arguments.kills} bit-identical")
    sys.exit(same != arguments.kills)


FLAGS = ["-m", "llama", "--num-calibration-samples", "32", "--max-seq-length", "64", "--eval-windows", "8", "-o", "out"]


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "slimlm", "compress", *FLAGS, *more]


def undisturbed(place: Path) -> tuple[dict[str, bytes], float, float]:
    """The files of a whole run, and the seconds between its first file on disk and its end."""
    start = time.monotonic()
    process = subprocess.Popen(command(), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (place / "out.partial").exists():
        time.sleep(0.01)
    began = time.monotonic() - start
    assert process.wait() == 0
    ended = time.monotonic() - start
    files = result(place / "out")
    shutil.rmtree(place / "out")
    return files, began, ended


def result(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in TIMED}


def kill_once(place: Path, instant: float, reference: dict[str, bytes]) -> bool:
    process = subprocess.Popen(command(), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(instant)
    process.kill()
    process.wait()
    journals = sorted((place / "out.partial").rglob("journal.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = journals[-1].read_text().splitlines(keepends=True) if journals else []
    run = journals[-1].relative_to(place / "out.partial").parts[-3:-2] if journals else ()
    steps = ["none", *(" ".join([json.loads(line)["step"], *run]) for line in lines if line.endswith("\n"))]
    standing = sorted(path.name for path in (place / "out").iterdir()) if (place / "out").exists() else []
    whole = set(reference) <= set(standing) and not {"work", "lock"} & set(standing)
    subprocess.run(command("--resume"), cwd=place, check=True, capture_output=True)
    same = result(place / "out") == reference and not (place / "out.partial").exists()
    under = "nothing" if not standing else "the whole result" if whole else "LEFTOVERS"
    print(f"| {instant:.2f} | {steps[-1]} | {under} | {'same' if same else 'DIFFERENT'} |", flush=True)
    shutil.rmtree(place / "out")
    return same and (whole or not standing)


if __name__ == "__main__":
    main()
