"""Kill a compression at random instants, resume it, and compare the result with an undisturbed run's.

    python eval/kill.py --kills 20 --seed 0
    python eval/kill.py --kills 20 --seed 0 --several
    python eval/kill.py --kills 10 --seed 0 --num-processes 2

Every run is the real command line on the bundled model. A row per kill: the instant, how far the run had come, whether
anything stood under the output's name, and whether the resumed run's weights, config and tokenizer are the same bytes.
Of several processes one is killed; the others have to end within seconds, saying which it was.
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

import psutil

SECONDS = 15  # for the others to end in
TIMED = ("slimlm.json", "slimlm.log.jsonl", "README.md", "recipe.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--several", action="store_true", help="kill a recipe of three runs: pruning in three shots")
    parser.add_argument("--num-processes", type=int, default=1, help="in which the run goes on; one of them is killed")
    arguments = parser.parse_args()
    if arguments.num_processes > 1:
        FLAGS.append(f"--num-processes={arguments.num_processes}")
    if arguments.several:
        FLAGS.extend(["--method=sparsegpt", "--set=shots=3", "--sparsity=0.6"])
    else:
        FLAGS.append("--sparsity=0.25")
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        undisturbed(place)  # warms the file cache, or the timed run would look longer than the killed ones
        reference, began, ended = undisturbed(place)
        same = 0
        print("| kill at, s | last finished step | under the name | resumed, bytes |\n| --- | --- | --- | --- |")
        for _ in range(arguments.kills):
            victim = chance.randrange(arguments.num_processes) if arguments.num_processes > 1 else None
            same += kill_once(place, chance.uniform(began, ended), reference, victim)
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
        assert process.poll() is None, "the run ended before it began"
        time.sleep(0.01)
    began = time.monotonic() - start
    assert process.wait() == 0
    ended = time.monotonic() - start
    files = result(place / "out")
    shutil.rmtree(place / "out")
    return files, began, ended


def result(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in TIMED]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def end(process: subprocess.Popen[str], victim: int | None) -> bool:
    """Kill a run, or one of its processes, by rank; False where the others do not end with the right words."""
    if victim is None:
        process.kill()
        process.communicate()
        return True
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    if str(victim) not in ranks:  # it is over already
        process.communicate()
        return True
    ranks[str(victim)].kill()
    try:
        _, said = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        print("the others went on", flush=True)
        return False
    ended = process.returncode == 0 or f"rank {victim} was killed by SIGKILL" in said
    if not ended:
        print(f"exit code {process.returncode}: {said[-500:]}", flush=True)
    return ended


def kill_once(place: Path, instant: float, reference: dict[str, bytes], victim: int | None = None) -> bool:
    process = subprocess.Popen(command(), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(instant)
    ended = end(process, victim)
    journals = sorted((place / "out.partial").rglob("journal.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = journals[-1].read_text().splitlines(keepends=True) if journals else []
    run = journals[-1].relative_to(place / "out.partial").parts[-3:-2] if journals else ()
    steps = ["none", *(" ".join([json.loads(line)["step"], *run]) for line in lines if line.endswith("\n"))]
    standing = {str(path.relative_to(place / "out")) for path in (place / "out").rglob("*")}
    whole = reference.keys() <= standing and not {"work", "lock"} & standing
    subprocess.run(command("--resume"), cwd=place, check=True, capture_output=True)
    same = result(place / "out") == reference and not (place / "out.partial").exists()
    under = "nothing" if not standing else "the whole result" if whole else "LEFTOVERS"
    which = "" if victim is None else f", rank {victim}"
    print(f"| {instant:.2f}{which} | {steps[-1]} | {under} | {'same' if same else 'DIFFERENT'} |", flush=True)
    shutil.rmtree(place / "out")
    return ended and same and (whole or not standing)


if __name__ == "__main__":
    main()
