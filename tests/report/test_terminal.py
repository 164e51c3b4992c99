import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimlm.cli import app
from slimlm.report.progress import progress_shown
from slimlm.report.table import comparison_table
from slimlm.report.terminal import console
from tests.conftest import CONFIGS, build_tiny
from tests.test_display import ODD


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with progress_shown() as progress:
        progress.stage(ODD, 2)
        progress.line(f"model: {ODD}")
    assert capsys.readouterr().err == f"model: {ODD}\n"
    console().print(comparison_table([ODD], [("parameters", ["1"])]))
    assert ODD in capsys.readouterr().out


PLAIN, DUMB = {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "dumb"}


@pytest.mark.parametrize("environment", [{}, PLAIN, DUMB], ids=["pipe", "no colour", "dumb"])
@pytest.mark.parametrize("command", ["models", "methods", "recipes", "inspect"])
def test_lists_and_tables_fit_80_columns(command: str, environment: dict[str, str], tmp_path: Path):
    words = ["inspect", str(build_tiny(CONFIGS["llama"], tmp_path / "m"))] if command == "inspect" else [command]
    shown = CliRunner().invoke(app, words, env={**environment, "COLUMNS": "80"}).stdout
    styles = set(re.findall(r"\x1b\[[0-9;]*m", shown))
    assert styles <= ({"\x1b[1m", "\x1b[0m"} if environment is PLAIN else set())
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(len(line) for line in lines if not line.endswith(".yaml")) <= 80
    assert len(lines) > 4
    assert "…" not in shown


def test_every_name_and_figure_of_a_list_is_whole():
    for command, name, keys in (
        ("models", "models", ("model_type",)),
        ("recipes", "recipes", ("name", "path", "model")),
    ):
        shown = CliRunner().invoke(app, [command], env={"COLUMNS": "80"}).stdout
        listed = json.loads(CliRunner().invoke(app, [command, "--json", "-"]).stdout)[name]
        for one in listed:
            assert all(one[key] in shown for key in keys)
            assert all(f"{figure:,.10g}" in shown for figure in one.get("expected", {}).values())
            assert (one.get("carrier") or "") in shown
