import pytest

from slimlm.report.progress import progress_shown
from slimlm.report.table import comparison_table
from slimlm.report.terminal import console
from tests.test_display import ODD


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with progress_shown() as progress:
        progress.stage(ODD, 2)
        progress.line(f"model: {ODD}")
    assert capsys.readouterr().err == f"model: {ODD}\n"
    console().print(comparison_table([ODD], [("parameters", ["1"])]))
    assert ODD in capsys.readouterr().out
