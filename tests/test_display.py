"""Progress of whole runs: that what is expected is what comes, and what is shown of it where."""

import io
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from slimlm import display
from slimlm.check import How, check
from slimlm.checkpoint.journal import Journal
from slimlm.display import Whole, in_words, usual
from slimlm.evaluation.evaluate import evaluate
from slimlm.recipe import one_step
from slimlm.report import progress as shown_by_commands
from slimlm.report.progress import progress_shown
from slimlm.report.terminal import console
from slimlm.stages import compress
from slimlm.work import LEAST_MEASURED, MOST_MEASURED, work_of
from tests.conftest import in_steps, on_tokens
from tests.test_resume import Killed, die_at

ODD = "./a[/b][v2] :smile: [bold]"
UNEXPECTED = {"checking weights", "finding the basis", "timing the first steps"}


class Told(Whole):
    """Keeps what it was told, and the share of all work at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[int, str]] = []
        self.expected: list[tuple[int, str]] = []
        self.shares: list[float] = []
        self.lines: list[str] = []

    def expect(self, parts: Sequence[Mapping[str, float]]) -> None:
        super().expect(parts)
        self.shares.clear()
        self.expected = [(number, name) for number, part in enumerate(parts) for name in part]

    def stage(self, name: str, total: int, first: int = 0) -> None:
        super().stage(name, total, first)
        self.stages += [] if name in UNEXPECTED else [(self.pace.part, name)]

    def show(self) -> None:
        self.shares.append(self.pace.share)

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict:
    return on_tokens(tiny_llama, tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"sparsity": 0.3},
        {"sparsity": 0.3, "self_share": 0.3, "measure": False},
        {"widths": "hidden=24", "refit": False},
        {"widths": "hidden=24", "basis": "per-block"},
        {"method": "rotate"},
        {"method": "slimlm", "sparsity": 0.5},
        {"method": "slimlm", "sparsity": 0.5, "allocation": "solved"},
        {"method": "mfac", "sparsity": 0.5},
        {"method": "magnitude", "sparsity": 0.5},
        {"method": "sparsegpt", "sparsity": 0.5, "allocation": "owl"},
    ],
    ids=str,
)
def test_what_is_expected_of_a_run_is_what_comes(settings: dict, more: dict):
    told = Told()
    compress(one_step(**{**settings, **more}), progress=told)
    assert list(dict.fromkeys(told.stages)) == told.expected
    assert told.shares == pytest.approx(sorted(told.shares))
    assert told.shares[-1] == pytest.approx(1)


def test_steps_of_a_recipe_are_one_whole(settings: dict, tmp_path: Path):
    recipe = in_steps({**settings, "sparsity": 0.3}, {"method": "sparsegpt", "sparsity": 0.5})
    told = Told()
    compress(in_steps({**settings, "sparsity": 0.3}, {"method": "recover", "tokens": 24 * 8 * 2}), progress=told)
    assert list(dict.fromkeys(told.stages)) == told.expected
    assert {part for part, _ in told.stages} == {0, 1}
    assert told.shares == pytest.approx(sorted(told.shares))
    assert told.at.startswith("step 2 of 2, ")
    assert "step 2 of 2: recover, 384 tokens" in told.lines
    assert len(recipe.steps) == 2


def test_models_that_are_measured_are_one_whole(tiny_llama: Path, tmp_path: Path):
    told = Told()
    paths = [str(shutil.copytree(tiny_llama, tmp_path / name)) for name in ("one", "other")]
    evaluate(paths, str(tiny_llama), tasks=(), num_windows=2, window=16, generate=2, progress=told)
    assert told.stages == told.expected
    assert told.shares == pytest.approx(sorted(told.shares))
    assert told.shares[-1] == pytest.approx(1)


def test_a_run_that_goes_on_says_what_it_keeps(settings: dict, monkeypatch: pytest.MonkeyPatch):
    recipe = one_step(**{**settings, "sparsity": 0.3, "self_share": 0.3, "measure": False})
    first = Told()
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "commit", 9, True)
        with pytest.raises(Killed):
            compress(recipe, progress=first)
    again = Told()
    compress(recipe, resume=True, progress=again)
    assert not [line for line in first.lines if line.startswith("resuming")]
    (line,) = [line for line in again.lines if line.startswith("resuming")]
    assert "text that the model wrote, the basis, the widths" in line
    assert {name for _, name in again.stages} < {name for _, name in first.stages} | {"refitting the head"}
    assert again.shares[0] > 0.1


def test_a_log_that_is_no_terminal_gets_a_line_a_minute(capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(shown_by_commands, "MINUTE", 0.01)
    told = threading.Event()
    tell = shown_by_commands.Logged.tell
    monkeypatch.setattr(shown_by_commands.Logged, "tell", lambda logged: (tell(logged), told.set()))
    with progress_shown() as progress:
        progress.pace.clock = lambda: 5.0
        progress.expect([{"one": 1.0, "two": 3.0}, {"one": 4.0}])
        progress.stage("two", 3)
        progress.step()
        progress.done("two", ODD, 1.0)
        progress.line(f"model: {ODD}")
        told.clear()
        assert told.wait(60)
    said = capsys.readouterr().err
    assert f"model: {ODD}\n" in said
    assert "step 1 of 2, two 1/3: 25% of all, 0 s left, " in said
    assert "two in 1.0 s" not in said


def test_a_bar_shows_its_stage_as_it_is_within_80_columns(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    terminal = console(stderr=True)
    terminal.file = screen
    monkeypatch.setattr("slimlm.report.progress.console", lambda stderr: terminal)
    with progress_shown() as progress:
        progress.pace.clock = lambda: 5.0
        progress.expect([{"sampling text": 1.0}] * 3)
        progress.stage("sampling text", 160)
        progress.step(120)
        progress.bars.refresh()
        assert "step 1 of 3, sampling text 120/160" in screen.getvalue()
        assert "25% of all, 0 s left, " in screen.getvalue()
        assert " GB" in screen.getvalue()
        progress.stage(ODD, 2)
        progress.bars.refresh()
        progress.stage("perplexity of meta-llama/Llama-3.2-3B-Instruct", 128)
        progress.bars.refresh()
    assert ODD in screen.getvalue()
    last = screen.getvalue().rpartition("perplexity of")[2]
    assert "meta-llama/Llama-3.2-3B-Instruct" in last
    assert "0/128" in last
    assert "…" not in screen.getvalue()


def test_a_notebook_has_lines_and_one_that_changes(monkeypatch: pytest.MonkeyPatch):
    shell = type("Shell", (type(display.KERNEL, (), {}),), {})()  # Colab's
    shows: list[str] = []
    handle = SimpleNamespace(update=lambda data, raw: shows.append(f"= {data['text/plain']}"))

    def show(data: dict, raw: bool, display_id: bool = False):
        shows.append(data["text/plain"])
        return handle

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=show))
    progress = usual(None)
    progress.pace.clock = lambda: 5.0
    progress.expect([{"one": 1.0}])
    progress.stage("one", 4)
    progress.line("model: here")
    progress.done("one", "block", 1.0)
    progress.step()
    assert shows[0] == ""
    assert shows[2] == "model: here"
    assert shows[1].startswith("= one 0/4: 0% of all, ")
    assert shows[3].startswith("= one 1/4: 25% of all, 0 s left, ")
    assert len(shows) == 4


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.4, "5 s"), (89.4, "89 s"), (90, "2 min"), (5369, "89 min"), (5400, "1 h 30 min")]
)
def test_times_are_told_as_people_do(seconds: float, words: str):
    assert in_words(seconds) == words


@pytest.mark.parametrize("asked", [{}, {"eval_windows": "auto"}, {"eval_windows": 77}])
@pytest.mark.parametrize(
    "more",
    [{"method": "magnitude", "sparsity": 0.5}, {"widths": "hidden=24"}, {"method": "sparsegpt", "pattern": "2:4"}],
)
def test_measuring_takes_no_longer_than_the_rest_unless_it_is_told_to(settings: dict, more: dict, asked: dict):
    del settings["eval_windows"]
    job = check(one_step(**{**settings, **more, **asked}).steps[0], How(progress=Told()))
    work = work_of(job.recipe, job.model)
    measuring = work.pop("measuring")
    assert measuring == 2 * job.recipe.eval_windows
    assert job.recipe.eval_windows == asked.get("eval_windows") or job.recipe.eval_windows == max(
        LEAST_MEASURED, min(MOST_MEASURED, int(sum(work.values()) / 2))
    )
    assert job.test is not None
    assert len(job.test.tokens) == job.recipe.eval_windows
