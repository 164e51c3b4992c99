"""Several processes of one command: what they print, what they find, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from slimlm.cli.launch import blamed, in_processes
from slimlm.errors import UserError
from slimlm.evaluation.evaluate import evaluate
from slimlm.evaluation.prompts import PROMPTS
from slimlm.started import LOST, environment

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
FEW = {"num_windows": 20, "window": 32, "limit": 8.0, "batch_size": 3, "generate": 8}  # the last batch is smaller
FLAGS = [
    "eval",
    "llama",
    *(word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", str(value))),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# Stands in for what takes long: each of the processes writes down that it is there, then does as told.
STUB = """
import os, sys, time, types

if os.environ.get("RANK"):
    def evaluate(**settings):
        from pathlib import Path
        from slimlm.errors import RunFailure
        from slimlm.meeting import start_ranks
        how, rank = os.environ["HOW"], os.environ["RANK"]
        with start_ranks("cpu") as ranks:
            Path(os.environ["THERE"], rank).write_text(str(os.getpid()))
            ranks.meet()
            if rank == "1" and how == "fail":
                raise RunFailure("it broke")
            if rank == "1" and how == "stumble":
                1 / 0
            if how == "all fail":
                raise RunFailure("it broke")
            while rank == "1":
                time.sleep(0.1)
            ranks.meet()
    sys.modules["slimlm.evaluation.evaluate"] = types.SimpleNamespace(evaluate=evaluate)
"""


def started(tmp_path: Path, how: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    (tmp_path / "there").mkdir()
    (tmp_path / "sitecustomize.py").write_text(STUB)
    environment = {**ENVIRONMENT, "HOW": how, "THERE": str(tmp_path / "there"), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "slimlm", "eval", "llama", *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts,
    )  # fmt: skip


def heed_interrupts() -> None:
    """What a shell starts beside itself is born deaf to them, and so is all that that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def all_there(tmp_path: Path, size: int) -> list[psutil.Process]:
    """The processes, as soon as all are at work."""
    deadline = time.monotonic() + 60
    files = [tmp_path / "there" / str(rank) for rank in range(size)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)  # to be inside what they wait in
    return [psutil.Process(int(file.read_text())) for file in files]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, and the two streams."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate("llama", **FEW).data
    finally:
        torch.set_num_threads(threads)


def assert_same(data: dict[str, Any], expected: dict[str, Any], size: int) -> None:
    """Every digit, and that each process did its share."""
    left_out = {"machine", "ranks", "models"}
    assert {**data, **dict.fromkeys(left_out)} == {**expected, **dict.fromkeys(left_out)}
    for model, other in zip(data["models"], expected["models"], strict=True):
        assert {**model, "seconds": 0} == {**other, "seconds": 0}
    assert [entry["rank"] for entry in data["ranks"]] == list(range(size))
    assert sum(entry["windows"] for entry in data["ranks"]) == 2 * FEW["num_windows"]  # of two texts
    assert sum(entry["continuations"] for entry in data["ranks"]) == 2 * len(PROMPTS)  # in two ways
    assert sum(entry["requests"] for entry in data["ranks"]) == 4 * FEW["limit"]
    for kind in ("windows", "requests"):
        assert min(entry[kind] for entry in data["ranks"]) >= 0.5 * max(entry[kind] for entry in data["ranks"])


def test_two_processes_find_what_one_does_and_say_it_once(tmp_path: Path, one_process: dict[str, Any]):
    process = subprocess.run(
        [sys.executable, "-m", "slimlm", *FLAGS, "--num-processes", "2", "--json", "two.json"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.count("same scores by:") == 1
    assert process.stdout.count("written to two.json") == 1
    assert_same(json.loads((tmp_path / "two.json").read_text()), one_process, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["two.json"]


@pytest.mark.slow
@pytest.mark.parametrize("windows", [20, 2])  # of 2 one rank has none
def test_two_processes_stream_a_model_to_the_same_number(tmp_path: Path, windows: int):
    words = f"eval llama --tasks none --window 64 --batch-size 3 --generate 0 --num-windows {windows} --json".split()
    for name, more in (("one", []), ("two", ["--stream", "--num-processes", "2"])):
        command = [sys.executable, "-m", "slimlm", *words, name, *more]
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert {**one["models"][0], "streamed": True, "seconds": 0} == {**two["models"][0], "seconds": 0}
    assert sum(entry["windows"] for entry in two["ranks"]) == 2 * windows  # of two texts


@pytest.mark.slow
def test_two_launchers_stand_in_for_two_machines(tmp_path: Path, one_process: dict[str, Any]):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *f"--nnodes 2 --node-rank {node} --nproc-per-node 1 --master-addr localhost".split(),
             "--master-port", port, "-m", "slimlm", *FLAGS, "--json", str(tmp_path / "all.json")],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in ("0", "1")
    ]  # fmt: skip
    (first, out, _), (second, other, _) = map(ended, nodes)
    assert (first, second) == (0, 0)
    assert (out.count("same scores by:"), other) == (1, "")
    assert_same(json.loads((tmp_path / "all.json").read_text()), one_process, 2)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("fail", "slimlm: rank 1: it broke\n"),
        pytest.param("stumble", "ZeroDivisionError: division by zero\n", marks=pytest.mark.slow),
    ],
)
def test_what_one_process_fails_of_is_said_once_and_ends_all(tmp_path: Path, how: str, line: str):
    code, out, err = ended(started(tmp_path, how, "--num-processes", "3"))
    assert (code, out) == (1, "")
    assert err.endswith(line)
    assert err.count("Error") == line.count("Error")
    assert err.count("slimlm: ") == line.count("slimlm: ")


def test_what_all_fail_of_is_said_once(tmp_path: Path):
    code, _, err = ended(started(tmp_path, "all fail", "--num-processes", "2"))
    assert code == 1
    assert err in [f"slimlm: rank {rank}: it broke\n" for rank in range(2)]


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (signal.SIGKILL, "rank 1 was killed by SIGKILL"),
        pytest.param(signal.SIGTERM, "rank 1 was killed by SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_ends_all_and_is_named(tmp_path: Path, stop: signal.Signals, line: str):
    process = started(tmp_path, "wait", "--num-processes", "2")
    ranks = all_there(tmp_path, 2)
    ranks[1].send_signal(stop)
    assert ended(process) == (128 + stop, "", f"slimlm: {line}\n")
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_all_processes_and_is_the_exit_code(tmp_path: Path, stop: signal.Signals):
    process = started(tmp_path, "wait", "--num-processes", "2")
    ranks = all_there(tmp_path, 2)
    process.send_signal(stop)
    assert ended(process) == (128 + stop, "", "slimlm: interrupted\n")
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


@pytest.mark.slow
def test_processes_end_with_the_one_that_launched_them(tmp_path: Path):
    process = started(tmp_path, "wait", "--num-processes", "2")
    ranks = all_there(tmp_path, 2)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


@pytest.mark.slow
def test_under_torchrun_one_that_was_killed_is_missed_in_one_line(tmp_path: Path):
    process = started(tmp_path, "wait", launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"))
    all_there(tmp_path, 2)[1].kill()
    code, _, err = ended(process)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("slimlm: ")]
    # torchrun stops the others within a tenth of a second, which one may notice first
    assert line.startswith(("slimlm: rank 0: rank 0 lost contact with the others", "slimlm: rank 0: interrupted"))


def test_a_signal_ends_a_process_that_waits_inside_a_library(tmp_path: Path):
    script = """
import os
from datetime import timedelta
from slimlm.cli import _heed_signals
from slimlm.cli.running import Stopped
from slimlm.cli.several import begin_as_one_of_several
import torch.distributed as dist
_heed_signals()
begin_as_one_of_several()
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
try:
    print("waits", flush=True)
    store.wait(["never"], timedelta(minutes=5))
except Stopped:  # the signal came before the library had it
    os._exit(143)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**ENVIRONMENT, "WORLD_SIZE": "2"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.5)
    process.terminate()
    assert ended(process)[0] == 143


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: LOST, 1: 2, 2: -15}, (1, 2)),
        ({0: -15, 1: -9}, (1, -9)),
        ({2: LOST, 0: 143}, (0, 143)),
        ({1: 143, 0: 143}, (1, 143)),  # the first that was seen
        ({1: LOST, 0: LOST}, (1, LOST)),
    ],
)
def test_blame_is_with_the_one_that_began(codes: dict[int, int], expected: tuple[int, int]):
    assert blamed(codes) == expected


def refused(call: Callable[[], bool]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_what_cannot_be_launched_is_refused():
    with environment(WORLD_SIZE="2"):
        assert "this is one of 2 that run already" in refused(lambda: in_processes(2, "cpu"))
    gpus = torch.cuda.device_count()
    line = f"--num-processes {gpus + 2} with --device cuda: there are {gpus} GPUs"
    assert line in refused(lambda: in_processes(gpus + 2, "cuda"))
    assert not in_processes(None, "cpu")
    assert not in_processes(1, "cpu")


def test_a_model_is_not_spread_by_each_of_several_processes():
    from slimlm.evaluation.evaluate import _checked
    from slimlm.ranks import Ranks
    from slimlm.settings import EvalSettings

    with pytest.raises(UserError, match="--device-map is for one process"):
        _checked(EvalSettings("llama", device_map="auto"), Ranks(size=2))
