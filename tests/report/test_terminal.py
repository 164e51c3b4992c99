import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import RenderableType
from typer.testing import CliRunner

from slimlm.cli import app
from slimlm.report.progress import progress_shown
from slimlm.report.table import comparison_table
from slimlm.report.terminal import as_text, console, lines_of, sentences
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
def test_lists_and_tables_fit_80_columns(command: str, environment: dict[str, str], tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["inspect", "./m"] if command == "inspect" and build_tiny(CONFIGS["llama"], tmp_path / "m") else [command]
    shown = CliRunner().invoke(app, words, env={**environment, "COLUMNS": "80"}).stdout
    styles = set(re.findall(r"\x1b\[[0-9;]*m", shown))
    assert styles <= ({"\x1b[1m", "\x1b[0m"} if environment is PLAIN else set())
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(len(line) for line in lines if not line.endswith(".yaml")) <= 80
    assert len(lines) > 4
    assert "…" not in shown


def shown_at_80(
    parts: Callable[[], list[RenderableType]], is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Lines, without what ends them and spaces before that."""
    for name, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    return [line.rstrip() for line in as_text(parts()).splitlines()]


LONG = "what was said is of more words than one line of a terminal has room for, and 1,234.5 is a number"


def test_sentences_are_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch):
    assert shown_at_80(lambda: sentences(LONG), False, monkeypatch) == [LONG]
    lines = shown_at_80(lambda: sentences(LONG, "/".join(LONG.split())), True, monkeypatch)
    assert lines == [*textwrap.wrap(LONG, 80), "/".join(LONG.split())]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_to_be_copied_is_never_broken(is_terminal: bool, monkeypatch: pytest.MonkeyPatch):
    assert shown_at_80(lambda: lines_of(LONG), is_terminal, monkeypatch) == [LONG]


@pytest.mark.parametrize("width", [12, 18, 40])
def test_a_label_is_broken_behind_underscores(width: int):
    table = comparison_table(["a"], [("python_reference_continuation", ["1"])])
    table.columns[0].width = width
    words = [line.split()[0] for line in as_text([table]).splitlines() if "_" in line or "cont" in line]
    assert "".join(words) == "python_reference_continuation"
    assert all(word.endswith(("_", "continuation")) for word in words)


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
