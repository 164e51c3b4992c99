"""The command line where the machine, the terminal or the user gets in its way."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from slimlm.cli import app
from slimlm.cli.assign import with_assigned
from slimlm.cli.compress import COMPRESS_FLAGS, CompressOptions, chosen_recipe
from slimlm.errors import UserError
from slimlm.methods import METHODS
from slimlm.recipe import FIELDS, FLAGS, recipe_of_flags
from slimlm.report.methods import method_rows, methods_table

# Commands whose work is replaced by what stands before them, so that nothing has to be imported for it.
WORK = """
import os, signal, sys
from types import SimpleNamespace
from slimlm.cli import main
from slimlm.cli.running import Stopped

def stand_ins(work):
    sys.modules["slimlm.stages"] = SimpleNamespace(compress=work)
    sys.modules["slimlm.evaluation.evaluate"] = SimpleNamespace(evaluate=work)
    sys.modules["slimlm.inspection"] = SimpleNamespace(inspect_model=work)

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
            "texts": {"text": {"perplexity": 3.0, "log_perplexity_stderr": 0.1, "bits_per_byte": 1.5}},
            "tasks": {"t": {"acc": {"value": 0.5, "stderr": 0.125}}},
            "generation": None,
            "warnings": [],
        }
    ],
    "pairs": [],
    "written": [],
    "notes": [],
    "texts": [{"text": "text", "windows": 1, "window": 2, "stride": 2, "bos": None}],
    "versions": {},
}
EVALUATED = f"""
found = SimpleNamespace(data={DATA!r}, unsaved=None)
sys.modules["slimlm.evaluation.evaluate"] = SimpleNamespace(evaluate=lambda **_: found)
"""


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
    stand_ins(stopped(number))
    for arguments in (["compress", "-m", "llama", "-s", "0.5"], ["eval", "llama"], ["inspect", "llama"]):
        assert run(*arguments) == 128 + number, (arguments, number)
"""
    )
    done = python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("slimlm: ")]
    resumable = "slimlm: interrupted; run the same command with --resume to go on"
    assert lines == [resumable, "slimlm: interrupted", "slimlm: interrupted"] * 3


# Python imports this before anything else: Ctrl-C when one of these modules is about to be imported.
SIGNALLED = """
import os, signal, sys

class Signalled:
    def find_spec(self, name, *_):
        if name == os.environ["AT"]:
            sys.meta_path.remove(self)
            print("signalled", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.meta_path.insert(0, Signalled())
"""
CONSOLE = "import sys; from {module} import {function}; sys.argv = ['slimlm', 'methods']; sys.exit({function}())"


@pytest.mark.parametrize("started", ["module", "console"])
@pytest.mark.parametrize(
    "moment", ["slimlm.cli", "typer", "pydantic_core", "slimlm.cli.compress", "slimlm.report.methods"]
)
def test_ctrl_c_is_heeded_from_the_first_import_on(started: str, moment: str, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED)
    root = Path(__file__).parents[2]
    entry = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["slimlm"]
    module, function = entry.split(":")
    words = (
        ["-m", "slimlm", "methods"] if started == "module" else ["-c", CONSOLE.format(module=module, function=function)]
    )
    path = f"{tmp_path}{os.pathsep}{root}"
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, "AT": moment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "signalled\n")
    assert done.stderr in ("", "slimlm: interrupted\n")


@pytest.mark.parametrize("stop", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_dry_run_that_ends_takes_its_probe_along(tmp_path: Path, stop: signal.Signals):
    process = subprocess.Popen(
        command(*QUICK, "--dry-run"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    probes: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not probes or not list(tmp_path.glob(".slimlm-probe-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        children = psutil.Process(process.pid).children()
        probes = [child for child in children if any("slimlm.probe" in part for part in child.cmdline())]
        time.sleep(0.05)
    process.send_signal(stop)
    process.communicate(timeout=120)
    assert process.returncode == (143 if stop == signal.SIGTERM else -signal.SIGKILL)
    psutil.wait_procs(probes, timeout=120)
    assert not any(probe.is_running() for probe in probes)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_at_the_command_line_are_met_with_what_was_meant():
    with pytest.raises(UserError, match=r"^sparsity is the share .* not 25: did you mean 0\.25\?$"):
        chosen_recipe(None, {"model": "llama", "sparsity": 25.0})
    with pytest.raises(UserError, match="has a command of its own: try `slimlm rotate"):
        chosen_recipe(None, {"model": "llama", "method": "rotate"})
    with pytest.raises(UserError, match="^--set round_to: "):
        chosen_recipe(None, {"model": "llama", "sparsity": 0.25, "round_to": 0})
    with pytest.raises(UserError, match="^recipe here: unknown key 'sparsty'"):
        recipe_of_flags({"model": "llama", "sparsity": 0.25, "sparsty": 1}, "recipe here")


EXTRAS = {
    "recipe",
    "set",
    "overwrite",
    "resume",
    "resume-anyway",
    "work-dir",
    "stream-memory",
    "dry-run",
    "push-to-hub",
    "private",
}
EXTRAS |= {"token", "cache-dir", "quiet", "verbose", "help", "num-processes", "json"}


def flags_of(name: str) -> dict[str, str]:
    """The long flags of a command, and the help of each."""
    found = typer.main.get_command(app).commands[name].params
    return {option.opts[0].removeprefix("--"): option.help for option in found if option.opts[0].startswith("--")}


@pytest.mark.parametrize("name", typer.main.get_command(app).commands)
def test_no_name_is_cut_in_help_at_80_columns(name: str):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": ""}).output
    words = {word for line in shown.splitlines() for word in line.replace(",", " ").split()}
    assert max(map(len, shown.splitlines())) <= 80
    for parameter in typer.main.get_command(app).commands[name].params:
        names = [*parameter.opts, *parameter.secondary_opts]
        assert {name for name in names if name.startswith("-")} <= words


def test_every_flag_is_a_setting_or_one_of_few_others():
    found = flags_of("compress")
    assert len(found) == len(set(found))
    assert (
        found.keys() - EXTRAS
        == {name.replace("_", "-") for name in FLAGS}
        == {name.replace("_", "-") for name in COMPRESS_FLAGS}
    )
    assert found.keys() >= EXTRAS - {"help"}
    for name in FLAGS:
        assert (FIELDS[name].description or "?")[1:] in found[name.replace("_", "-")]
    others = {field.name for field in fields(CompressOptions) if field.metadata} - {"assignments"}
    assert {name.replace("_", "-") for name in others} == EXTRAS - {"set", "help", "json"} | {"json-path"}


@pytest.mark.parametrize("name", ["rotate", "eval", "inspect"])
def test_what_commands_share_is_one_thing(name: str):
    ours, theirs = flags_of("compress"), flags_of(name)
    for flag in ("token", "cache-dir", "trust-remote-code", "device", "revision"):
        assert theirs[flag] == ours[flag]


def test_what_has_no_flag_is_set_by_name():
    found = with_assigned({"seed": 3}, ["round-to=64", "weighting=none", "pattern=2:4", "fisher_damping=1e-3"])
    assert found == {"seed": 3, "round_to": 64, "weighting": "none", "pattern": "2:4", "fisher_damping": "1e-3"}
    assert with_assigned({}, ["skip=[lm_head, '*.o_proj']", "refit=false", "widths="]) == {
        "skip": ["lm_head", "*.o_proj"], "refit": False, "widths": None,
    }  # fmt: skip
    of_flags = chosen_recipe(None, with_assigned({"model": "llama", "sparsity": 0.5}, ["method=mfac", "shots=2"]))
    assert [step.sparsity for step in of_flags.steps] == [0.4375, 0.5]
    shipped = chosen_recipe("llama-slice-25", with_assigned({}, ["round_to=8"]))
    assert shipped.steps[0].round_to == 8


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("round_two=64", "^--set round_two=64: there is no setting 'round_two'; did you mean 'round_to'"),
        ("x=1", "^--set x=1: there is no setting 'x' .*without a flag of their own are basis, budget"),
        ("round_to", "^--set round_to: give NAME=VALUE"),
        ("round_to={", "^--set round_to={: while parsing"),
        ("sparsity=0.3", "^--sparsity is given twice"),
        ("fisher_samples=9", "^slice does not read --set fisher_samples"),
        ("basis=own", "^--set basis: Input should be 'shared' or 'per-block'"),
        ("schedule=linear", "^a schedule is of several shots"),
    ],
)
def test_what_cannot_be_set_is_refused_as_in_a_recipe(assignment: str, message: str):
    with pytest.raises(UserError, match=message):
        chosen_recipe(None, with_assigned({"model": "llama", "sparsity": 0.25}, [assignment]))


def test_set_reaches_the_run(tmp_path: Path):
    script = (
        WORK
        + """
def shown(recipe, *_, **__):
    print([(step.method, step.weighting, step.seed) for step in recipe.steps])
    raise Stopped(signal.SIGINT)
stand_ins(shown)
run("compress", "-m", "llama", "-s", "0.2", "--set", "weighting=none", "--seed", "4", "--set=round_to=8")
run("rotate", "-m", "llama", "--set", "weighting=none")
run("rotate", "-m", "llama", "--set", "method=slice")
"""
    )
    done = python(script, tmp_path)
    assert done.stdout.splitlines() == ["[('slice', 'none', 4)]", "[('rotate', 'none', 0)]"]
    assert done.stderr.splitlines()[-1] == "slimlm: --method is given twice"


def test_options_of_eval_are_arguments_of_evaluate(tmp_path: Path):
    script = (
        WORK
        + """
def shown(**settings):
    print({name: value for name, value in sorted(settings.items()) if name != "progress"})
    raise Stopped(signal.SIGINT)
stand_ins(shown)
run("eval", "llama", "--tasks", "a, b", "--num-windows", "0", "--trust-remote-code", "--limit", "0.5")
run("eval", "llama", "--tasks", "none", "--against", "other")
run("inspect", "llama", "--windows", "3", "--cache-dir", "here")
"""
    )
    lines = python(script, tmp_path).stdout.splitlines()
    assert "'tasks': ('a', 'b')" in lines[0]
    assert "'num_windows': 0" in lines[0]
    assert "'model': ('llama',)" in lines[0]
    assert "'trust_remote_code': True" in lines[0]
    assert "'limit': 0.5" in lines[0]
    assert "'tasks': ()" in lines[1]
    assert "'against': 'other'" in lines[1]
    assert "'num_windows': None" in lines[1]
    assert "'batch_size': None" in lines[1]
    assert "'windows': 3" in lines[2]
    assert "'cache_dir': PosixPath('here')" in lines[2]


def test_methods_are_listed_and_the_page_has_them():
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "240"}).output
    rows = method_rows()
    assert [row[0] for row in rows] == [f"`{name}`" for name in METHODS]
    for name, method in METHODS.items():
        assert f"{name}: " in shown
        assert method.paper.rpartition("/")[2] in shown
    page = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text()
    assert methods_table() in page, "run `slimlm methods --markdown` and put its table into docs/pruning.md"


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "-m", "./nowhere", "-s", "0.25"],
        ["compress", "-m", "./nowhere", "-s", "0.25", "--dry-run"],
        ["rotate", "-m", "./nowhere"],
        ["recover", "./nowhere"],
        ["eval", "./nowhere"],
        ["eval", "llama", "--against", "./nowhere"],
        ["bench", "llama", "--against", "./nowhere"],
        ["inspect", "./nowhere"],
    ],
)
def test_a_wrong_path_is_said_before_pytorch_is_imported(words: list[str], tmp_path: Path):
    script = f"""
import sys
from slimlm.cli import main
sys.argv = ["slimlm", *{words!r}]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    done = python(script, tmp_path)
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
    assert done.stderr == "slimlm: model directory './nowhere' does not exist\n"


def test_the_version_comes_with_those_of_what_a_bug_may_be_in(tmp_path: Path):
    done = subprocess.run(command("--version"), cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line.split()[0] for line in done.stdout.splitlines()]
    assert lines == ["slimlm", "torch", "transformers", "accelerate"]
    assert f"torch {version('torch')}" in done.stdout


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["compress", "--lora", "8"], "(`slimlm recover` has it)"),
        (["compress", "--round-to", "8"], "(try --set round_to=VALUE)"),
        (["eval", "llama", "--round-to", "8"], "(see --help)"),
    ],
)
def test_a_flag_of_another_command_is_met_with_where_it_is_read(words: list[str], end: str, tmp_path: Path):
    done = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith(end)
