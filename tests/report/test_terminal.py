import io

import pytest

from slimlm.report.progress import progress_bars
from slimlm.report.table import comparison_table
from slimlm.report.terminal import console

ODD = "./a[/b][v2] :smile: [bold]"


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bars() as progress:
        progress.stage(ODD, 2)
        progress.line(f"model: {ODD}")
    assert capsys.readouterr().err == f"model: {ODD}\n"
    console().print(comparison_table([ODD], [("parameters", ["1"])]))
    assert ODD in capsys.readouterr().out


def test_a_bar_shows_its_stage_as_it_is(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    terminal = console(stderr=True)
    terminal.file = screen
    monkeypatch.setattr("slimlm.report.progress.console", lambda stderr: terminal)
    with progress_bars() as progress:
        progress.stage(ODD, 2)
        progress.bars.refresh()
    assert ODD in screen.getvalue()
