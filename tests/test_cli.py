"""The command line where the machine, the terminal or the user gets in its way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from slimlm.cli import _chosen_recipe
from slimlm.errors import UserError
from slimlm.recipe import recipe_of_flags

# A command whose work is replaced by what stands before it.
WORK = """
import os, signal, sys
import slimlm.evaluation.evaluate, slimlm.compression, slimlm.inspection
from slimlm.cli import main

def run(*arguments):
    sys.argv = ["slimlm", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code
"""
DATA = {
    "models": [
        {
            "name": "./a[/b]",
            "parameters": 10,
            "bytes": 40,
            "dtype": "float32",
            "perplexity": 3.0,
            "tasks": {"t": {"acc": {"value": 0.5, "stderr": 0.125}}},
        }
    ],
    "windows": {"text": "text", "windows": 1, "window": 2, "stride": 2, "bos": None},
    "versions": {},
}
EVALUATED = f"slimlm.evaluation.evaluate.evaluate = lambda *_, **__: slimlm.evaluation.evaluate.Evaluation({DATA!r})\n"


def python(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "slimlm", *arguments]


# psutil is another one on Windows: what this system's needs, it may have.
WITHOUT = "import sys, psutil; sys.modules.update({'fcntl': None, 'resource': None});"


def test_help_and_the_api_need_no_module_that_windows_lacks(tmp_path: Path):
    script = f"""{WITHOUT}
import signal
del signal.SIGHUP
import slimlm, torch
from slimlm.device import peak_memory
assert peak_memory(torch.device("cpu"))["host"] > 10**7
from slimlm.cli import main
sys.argv = ["slimlm", "--help"]
main()
"""
    done = python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--model llama --sparsity 0.25" in done.stdout


def test_every_module_imports_without_those_that_windows_lacks(tmp_path: Path):
    done = python(f"{WITHOUT} import slimlm.forecast, slimlm.inspection, slimlm.evaluation.evaluate", tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_terminal_that_knows_ascii_only_fails_nothing(tmp_path: Path):
    script = WORK + EVALUATED + 'sys.exit(run("eval", "llama", "--json", "x.json"))'
    done = python(script, tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "0.5000 +- 0.1250" in done.stdout
    assert "./a[/b]" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text()) == DATA


def test_an_evaluation_that_fails_leaves_the_file_of_an_earlier_one(tmp_path: Path):
    (tmp_path / "old.json").write_text("earlier")
    script = (
        WORK
        + "sys.exit(run('eval', './nowhere', '--json', 'new.json') + run('eval', './nowhere', '--json', 'old.json'))"
    )
    assert python(script, tmp_path).returncode == 4
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "earlier"


@pytest.mark.parametrize("arguments", [["models"], ["models", "--markdown"], ["--help"], ["compress", "--help"]])
def test_a_reader_that_leaves_early_is_no_error(arguments: list[str]):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command(*arguments), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


QUICK = ["compress", "-m", "llama", "-s", "0.5", "--method", "magnitude", "--no-measure", "-o", "out"]


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path: Path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command(*QUICK), cwd=tmp_path, stdout=writing, stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 141
    assert (tmp_path / "out" / "slimlm.json").exists()


def test_a_run_with_closed_streams_writes_what_others_write(tmp_path: Path):
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command(*QUICK)], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_signal_is_the_exit_code_and_only_compress_speaks_of_resume(tmp_path: Path):
    script = (
        WORK
        + """
def stopped(number):
    def work(*_, **__):
        os.kill(os.getpid(), number)
        signal.pause()
    return work

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    slimlm.compression.compress = slimlm.evaluation.evaluate.evaluate = stopped(number)
    slimlm.inspection.inspect_model = stopped(number)
    for arguments in (["compress", "-m", "llama", "-s", "0.5"], ["eval", "llama"], ["inspect", "llama"]):
        assert run(*arguments) == 128 + number, (arguments, number)
"""
    )
    done = python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("slimlm: ")]
    resumable = "slimlm: interrupted; run the same command with --resume to go on"
    assert lines == [resumable, "slimlm: interrupted", "slimlm: interrupted"] * 3


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_dry_run_that_ends_takes_its_probe_along(tmp_path: Path, stop: signal.Signals):
    process = subprocess.Popen(
        command(*QUICK, "--dry-run"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    probes: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not probes:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        probes = [child for child in psutil.Process(process.pid).children() if "slimlm.probe" in child.cmdline()]
        time.sleep(0.05)
    assert list(tmp_path.glob(".slimlm-probe-*"))
    process.send_signal(stop)
    process.communicate(timeout=120)
    assert process.returncode == (143 if stop == signal.SIGTERM else -signal.SIGKILL)
    psutil.wait_procs(probes, timeout=120)
    assert not any(probe.is_running() for probe in probes)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_at_the_command_line_are_met_with_what_was_meant():
    with pytest.raises(UserError, match=r"^sparsity is the share .* not 25: did you mean 0\.25\?$"):
        _chosen_recipe(None, {"model": "llama", "sparsity": 25.0})
    with pytest.raises(UserError, match="has a command of its own: try `slimlm rotate"):
        _chosen_recipe(None, {"model": "llama", "method": "rotate"})
    with pytest.raises(UserError, match="^--round-to: "):
        _chosen_recipe(None, {"model": "llama", "sparsity": 0.25, "round_to": 0})
    with pytest.raises(UserError, match="^recipe here: unknown key 'sparsty'"):
        recipe_of_flags({"model": "llama", "sparsity": 0.25, "sparsty": 1}, "recipe here")
