"""Whether two versions of slimlm give the same, to the last bit: some 70 tiny runs of both, compared.

    python eval/golden.py OLD_TREE NEW_TREE                 # directories that hold slimlm/, as `git archive` makes them
    python eval/golden.py OLD_TREE --save /tmp/old.golden   # once, and then against that
    python eval/golden.py NEW_TREE --against /tmp/old.golden --only resumed
    python eval/golden.py --record                          # what tests/test_golden.py compares with

Weights and files are compared byte for byte; `config.json` and `slimlm.json` entry by entry, but for what tells of
times, memory, places and versions. Where one version's recipes are flat and the other's have steps, what the manifests
say of the recipe is left out. The cases are in `tests/golden/cases.py`. Exits with 1 if anything differs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.golden.cases import CASES, STORED  # noqa: E402

# Imports slimlm from the tree that PYTHONPATH names, and all else from here.
CHILD = "import sys, slimlm; sys.path.insert(0, sys.argv[1]); from tests.golden.run import main; main(*sys.argv[2:])"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
OF_THE_RECIPE = re.compile(r"(^|/)(recipe(/|$)|fingerprint/recipe )")  # in manifests, which forms of recipes change
MISSING = "nothing"


class Child:
    """A tree's run of some cases, in a process of its own."""

    def __init__(self, tree: Path, target: Path, place: Path, names: list[str]) -> None:
        if not (tree / "slimlm" / "__init__.py").is_file():
            sys.exit(f"{tree} holds no slimlm/")
        place.mkdir(parents=True, exist_ok=True)
        self.tree, self.target, self.log, self.start = tree, target, place / "log.txt", time.perf_counter()
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(tree.resolve())}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(ROOT), str(target), str(place), *names],
                cwd=place, env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self) -> Path:
        """The file with what it gave."""
        if self.process.wait() != 0:
            sys.exit(f"{self.tree} failed:\n{self.log.read_text()[-3000:]}")
        print(f"{self.tree}: {time.perf_counter() - self.start:.0f} s", flush=True)
        return self.target


class Results:
    """What one tree gave."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.file = safe_open(path, "pt")
        about = json.loads(self.file.metadata()["about"])
        self.form, self.conditions, self.cases = about["form"], about["conditions"], about["cases"]
        self.keys: dict[str, list[str]] = {}
        for key in self.file.keys():  # noqa: SIM118  # no dictionary
            case, _, name = key.partition("/")
            self.keys.setdefault(case, []).append(name)

    def tensors(self, case: str) -> dict[str, Any]:
        return {name: self.file.get_tensor(f"{case}/{name}") for name in self.keys.get(case, [])}


def entries_that_differ(old: dict[str, Any], new: dict[str, Any], what: str) -> list[str]:
    """One line naming the first entry that differs, and how many more do; none if all are the same."""
    keys = [key for key in {**old, **new} if old.get(key, MISSING) != new.get(key, MISSING)]
    if not keys:
        return []
    before, after = (str(side.get(keys[0], MISSING)) for side in (old, new))
    return [f"{what} {keys[0]}: {before:.60} -> {after:.60}{more(keys)}"]


def more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def bytes_of(tensor: Any) -> bytes:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_that_differ(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for tensors that only one has, and one for those whose bytes differ."""
    lines, distances = [], {}
    only = sorted(old.keys() ^ new.keys())
    if only:
        lines.append(f"tensor {only[0]} is only in the {'old' if only[0] in old else 'new'} one{more(only)}")
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name], new[name]
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            kinds = [f"{list(tensor.shape)} {str(tensor.dtype)[6:]}" for tensor in (before, after)]
            lines.append(f"tensor {name} is {kinds[1]}, was {kinds[0]}")
        elif bytes_of(before) != bytes_of(after):
            distances[name] = float((before.double() - after.double()).abs().max())
    if distances:
        first, worst = next(iter(distances)), max(distances, key=distances.__getitem__)
        lines.append(f"tensor {first}{more(list(distances))}; most {worst}, by {distances[worst]:.2g}")
    return lines


def differences(name: str, old: Results, new: Results) -> list[str]:
    """What of a case is not the same; nothing if all is."""
    before, after = old.cases[name], new.cases[name]
    if before["wording"] != after["wording"]:
        return ["the case is not what it was then: --save the old tree anew"]
    if failed := [f"{side} {case['error']}" for side, case in (("old", before), ("new", after)) if "error" in case]:
        return failed
    lines = tensors_that_differ(old.tensors(name), new.tensors(name))
    lines += entries_that_differ(before["config"], after["config"], "config.json")
    pair = [case["manifest"] for case in (before, after)]
    if old.form != new.form:
        pair = [{key: value for key, value in side.items() if not OF_THE_RECIPE.search(key)} for side in pair]
    lines += entries_that_differ(*pair, "slimlm.json")
    if not lines:  # or bytes of files differ anyway
        lines += entries_that_differ(before["files"], after["files"], "file")
    if before["interrupted"] != after["interrupted"]:
        lines.append(f"interrupted {before['interrupted']} -> {after['interrupted']}")
    return lines


def compared(old: Results, new: Results, names: list[str]) -> int:
    """Print a line per case, and return how many are not the same."""
    if old.conditions != new.conditions:
        print(f"these ran elsewhere: {old.conditions}, {new.conditions}")
    if old.form != new.form:
        print(f"recipes are {old.form} in the old and {new.form} in the new one: not compared in slimlm.json")
    different = 0
    for name in names:
        lines = differences(name, old, new) if name in old.cases else ["the old one has no such case"]
        different += bool(lines)
        print(f"DIFFERS  {name}: " + "; ".join(lines) if lines else f"same     {name}")
    print(f"{len(names) - different} of {len(names)} the same")
    return different


def run_trees(trees: list[Path], place: Path, names: list[str], jobs: int, save: Path | None) -> list[Path]:
    """Files with what each tree gave, one tree after another or side by side."""
    files, waiting = [], []
    for number, tree in enumerate(trees, 1):
        target = save if save and number == 1 else place / f"{number}.golden"
        waiting.append(Child(tree, target.resolve(), place / str(number), names))
        if len(waiting) == jobs:
            files += [child.wait() for child in waiting]
            waiting.clear()
    return files + [child.wait() for child in waiting]


def record() -> None:
    """Renew what the repository holds, from the slimlm beside this file."""
    command = "from tests.golden.stored import record; record()"
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, check=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="*", help="the old and the new one, or one with --save or --against")
    parser.add_argument("--only", action="append", default=[], help="cases whose names contain this; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="2: both trees side by side")
    parser.add_argument("--keep", type=Path, help="a directory for models and results, which stay there")
    parser.add_argument("--save", type=Path, help="a file for what the first tree gives")
    parser.add_argument("--against", type=Path, help="such a file, in place of the old tree")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--record", action="store_true", help=f"renew what is stored of {len(STORED)} cases")
    arguments = parser.parse_args()
    if not arguments.list and not arguments.record:
        wanted = 2 if not arguments.save and not arguments.against else 1
        if not wanted <= len(arguments.trees) <= 2 or (arguments.against and len(arguments.trees) > 1):
            parser.error("give OLD_TREE NEW_TREE, TREE --save FILE, or TREE --against FILE")
    return arguments


def main() -> None:
    arguments = parsed()
    names = [name for name in CASES if not arguments.only or any(part in name for part in arguments.only)]
    if arguments.list:
        print("\n".join(names))
        return
    if arguments.record:
        record()
        return
    with ExitStack() as stack:
        place = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = run_trees(arguments.trees, place.resolve(), names, arguments.jobs, arguments.save)
        if arguments.against:
            files.insert(0, arguments.against)
        if len(files) == 2:
            sys.exit(compared(Results(files[0]), Results(files[1]), names) > 0)


if __name__ == "__main__":
    main()
