"""A client's program, run in its environment on a model: what it says, or why it says nothing."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.environments import ENVIRONMENTS, described, python_of, source_of

PROGRAMS = Path(__file__).parent
ERROR = re.compile(r"^(?:\w+ ?: ?)?([\w.]*(?:Error|Exception|Failure|Exit)\b.*)")  # of Python, maybe of a rank
LENGTH = 200  # of an error that is shown
REFERENCE_SECONDS = 300


@dataclass(frozen=True)
class Client:
    program: str
    environment: str
    seconds: int = 300  # after which it has failed
    others: tuple[str, ...] = ()  # environments whose interpreters it uses as well
    keeps: bool = False  # what it made of a model serves another row


@dataclass(frozen=True)
class Model:
    name: str
    directory: Path
    dense: str | None  # name of the model to compare speeds with

    def stamp(self) -> str:
        """Changes with the checkpoint and what is asked of it."""
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.directory.iterdir()]
        return digest([sorted(files), (PROGRAMS / "reference.py").read_text()])


def stamp_of(client: Client, model: Model) -> str:
    """Changes with the checkpoint, the client's program and what its environment is made from."""
    programs = [(PROGRAMS / name).read_text() for name in (client.program, "comparison.py")]
    return digest([model.stamp(), programs, described(ENVIRONMENTS[client.environment])])


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def judged(client: Client, model: Model, work: Path, text: Path) -> dict[str, Any]:
    """What the client makes of the model, and how long that took once there was an environment."""
    started = time.perf_counter()
    try:
        python, others = python_of(client.environment, work), [python_of(name, work) for name in client.others]
        reference = reference_of(model, work, text)
        started = time.perf_counter()
        facts = ran(client, model, work, [python, *others], reference)
    except (RuntimeError, OSError, ValueError) as error:
        facts = {"passes": False, "error": str(error)}
    return {**facts, "seconds": round(time.perf_counter() - started, 1)}


def ran(client: Client, model: Model, work: Path, pythons: list[Path], reference: Path) -> dict[str, Any]:
    """Raises RuntimeError with the error of a program that fails."""
    scratch, source = work / "scratch" / client.environment, source_of(client.environment, work)
    folder = only_folder(scratch / model.name, model.stamp())
    command: list[Any] = [pythons[0], PROGRAMS / client.program, model.directory, reference, folder]
    dense = list((scratch / model.dense).iterdir()) if model.dense and (scratch / model.dense).exists() else []
    command += ["--dense", *dense] if dense else []
    command += ["--tools", source] if source else []
    try:
        output = output_of([*command, "--pythons", *pythons[1:]], client.seconds)
    finally:
        if not client.keeps:
            shutil.rmtree(folder.parent)
    return dict(json.loads((output.strip().splitlines() or [""])[-1]))


def only_folder(parent: Path, name: str) -> Path:
    """A folder there, with the others removed: they are of the model as it was."""
    for other in parent.glob("*"):
        if other.name != name:
            shutil.rmtree(other)
    (parent / name).mkdir(parents=True, exist_ok=True)
    return parent / name


def reference_of(model: Model, work: Path, text: Path) -> Path:
    """What transformers 5, beside this program, makes of the model as it is now."""
    out = only_folder(work / "references" / model.name, model.stamp()) / "reference.npz"
    if not out.exists():
        output_of([sys.executable, PROGRAMS / "reference.py", model.directory, out, text], REFERENCE_SECONDS)
    return out


def output_of(command: list[Any], seconds: int) -> str:
    """Standard output. Raises RuntimeError where the program fails or takes longer."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer in {seconds} s") from None
    finally:
        if process.poll() is None:  # also where this program is interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode < 0:
        raise RuntimeError(f"killed by signal {-process.returncode}")
    if process.returncode:
        raise RuntimeError(error_in(errors) or error_in(output) or f"exit {process.returncode}")
    return output


def error_in(text: str) -> str:
    """The last exception that Python printed, but for that of a program that called another; or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    places = [place for place, line in enumerate(lines) if ERROR.match(line) and "CalledProcessError" not in line]
    said = lines[places[-1] :] if places else lines[-1:]
    ends = [place for place, line in enumerate(said) if line.startswith(("Traceback", "During handling"))]
    return " ".join(said[: ends[0] if ends else None])[:LENGTH]
