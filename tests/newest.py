"""slimlm with the newest release of all it depends on, which is what users get, whatever constraints.txt says.

    .venv-newest/bin/python -m tests.newest

Exits 1 where slimlm uses what a library says it will remove, while there is time to mend it. Whatever else goes wrong
is said loudly and exits 0: another project's release stops no work here.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import re
import sys
import tempfile
import warnings
from importlib.metadata import requires, version
from pathlib import Path

import pytest

from tests.deprecation import HEARD, KINDS, ROOT

LAWS = ["tests/checkpoint/test_hf_internals.py", "tests/model/test_walk.py", "tests/calibration", "tests/families"]
QUICK = ["--num-calibration-samples", "8", "--max-seq-length", "64"]
COMMANDS = [
    ["compress", "--model", "llama", "--sparsity", "0.25", "--output-dir", "{out}", "--eval-windows", "4", *QUICK],
    ["eval", "{out}", "--against", "llama", "--num-windows", "4", "--limit", "8"],
]


def main() -> None:
    print_versions()
    # A warning of a release that came since fails no test here, though it does with those in constraints.txt.
    listen = ["-Wdefault"] + [f"-Walways::{kind.__name__}" for kind in KINDS]
    failures = (
        [f"pytest of the laws: exit code {code}"]
        if (code := pytest.main(["-q", "-m", "not slow", *listen, *LAWS]))
        else []
    )
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            arguments = [word.format(out=Path(folder) / "out") for word in command]
            print("slimlm", *arguments, flush=True)
            failures += [f"slimlm {arguments[0]}: {error}"] if (error := command_line(arguments)) else []
    for failure in failures:
        print(f"!!! FAILED WITH THE NEWEST RELEASES: {failure}")
    for use in sorted(set(HEARD.ever)):
        print(f"!!! USES WHAT WILL BE REMOVED: {use}")
    print(f"newest releases: {len(failures)} failures, {len(set(HEARD.ever))} uses of what will be removed")
    sys.exit(1 if HEARD.ever else 0)


def print_versions() -> None:
    """Of what slimlm requires, beside what constraints.txt says where that differs."""
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {name.lower().replace("_", "-"): pin for name, pin in locked.items()}
    for requirement in requires("slimlm") or []:
        if "extra ==" not in requirement:
            name = re.split(r"[^\w.-]", requirement)[0]
            found, pin = version(name), pins.get(name.lower().replace("_", "-"))
            print(f"{name} {found}" + (f" (constraints.txt: {pin})" if found.partition("+")[0] != pin else ""))


def command_line(arguments: list[str]) -> str | None:
    """What is wrong with a command, run in this process, where what libraries say of it is heard."""
    from slimlm.cli import main as slimlm

    sys.argv = ["slimlm", *arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with HEARD.watching():
            try:
                slimlm()
            except SystemExit as stop:
                return f"exit code {stop.code}" if stop.code else None
            except BaseException as error:
                return repr(error)
    return None


if __name__ == "__main__":
    main()
