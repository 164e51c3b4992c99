import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimlm.evaluation.evaluate import evaluate
from slimlm.report.evaluation import evaluation_summary, evaluation_tables, fragile_lines, writing_lines
from slimlm.report.terminal import console
from tests.conftest import CONFIGS, build_tiny

FEW = {"num_windows": 3, "window": 32, "generate": 6, "limit": 8, "dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = build_tiny(CONFIGS["llama"], tmp_path_factory.mktemp("a") / "tiny")
    return evaluate(str(path), "llama", fragile=2, **FEW).data


@pytest.mark.parametrize("columns", ["80", "62"])
def test_no_figure_is_cut(data: dict, columns: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    (table,) = evaluation_tables(data)
    console().print(table)
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(len(line) <= int(columns) for line in out.splitlines())
    entry, dense = data["models"]
    for one in (entry, dense):
        assert f"{one['parameters']:,}" in out
        assert f"{one['texts']['python-reference']['perplexity']:.2f} ± " in out
    kl = data["pairs"][0]["texts"]["python-sources"]["kl"]
    assert f"{kl['mean']:.4f} ± {kl['stderr']:.4f}" in out
    flips = data["pairs"][0]["tasks"]["python_reference_continuation"]["acc"]
    assert f"{flips['lost']:.1%}, {flips['won']:.1%}" in out


def test_of_a_model_alone_there_is_one_column(data: dict, capsys: pytest.CaptureFixture):
    for table in evaluation_tables({**data, "pairs": []}):
        assert len(table.columns) == 2
        console().print(table)
    assert capsys.readouterr().out.count("bits per byte") == 4


def test_a_model_that_is_broken_altogether_has_figures_that_can_be_read(data: dict, capsys: pytest.CaptureFixture):
    pair = json.loads(json.dumps(data["pairs"][0]))
    entry = json.loads(json.dumps(data["models"][0]))
    pair["texts"]["python-reference"] |= {"log_perplexity_change": 9000.0, "perplexity_ratio": math.exp(700)}
    entry["texts"]["python-reference"]["perplexity"] = math.exp(700)
    broken = {**data, "pairs": [pair], "models": [entry, data["models"][1]]}
    console().print(evaluation_tables(broken)[0])
    assert "1.01e+304" in capsys.readouterr().out
    summary = evaluation_summary(broken)
    assert "times" in summary.splitlines()[0]
    assert (
        f"WARNING: {pair['model']} is of no use so far: log-perplexity on python-reference rose by 9000.00" in summary
    )
    assert "of no use" not in evaluation_summary({**broken, "pairs": []})


def test_a_change_without_an_error_may_be_chance(data: dict):
    pair = json.loads(json.dumps(data["pairs"][0]))
    for metric in pair["tasks"]["python_reference_continuation"].values():
        metric["stderr"] = None
    assert "which may be chance" in evaluation_summary({**data, "pairs": [pair]}).splitlines()[0]


def test_each_of_several_models_has_its_table_under_its_name(data: dict):
    entry, dense = data["models"]
    long = "/a/path/that/takes/more/than/there/is/slice-25"
    several = {**data, "models": [{**entry, "name": "a"}, {**entry, "name": long}, dense], "pairs": data["pairs"] * 2}
    assert [table.columns[2].header for table in evaluation_tables(several)] == ["a", "...ere/is/slice-25"]


def test_the_summary_says_what_was_measured_how_and_what_is_wrong(data: dict):
    lines = evaluation_summary(data).splitlines()
    assert sum(line.startswith("perplexity on python-") for line in lines) == 2
    assert any(line.startswith("± is one standard error") for line in lines)
    change = data["pairs"][0]["texts"]["python-reference"]["log_perplexity_change"]
    assert f"{100 * math.expm1(change):+.1f}%" in lines[0]
    assert lines[0].startswith(data["models"][0]["name"])
    assert lines[0].endswith("its own text has COLLAPSED")
    collapsed = [line for line in lines if "its own text has collapsed" in line]
    assert collapsed  # random weights
    assert collapsed[0].startswith("WARNING: ")


def test_lost_documents_and_texts_are_lines(data: dict):
    lines = fragile_lines(data)
    assert sum(line.startswith("  window ") for line in lines) == 4
    shown = writing_lines(data["written"])
    assert sum(line.startswith("prompt: ") for line in shown) == 3
    assert sum(line.startswith("  llama: ") for line in shown) == 3


def test_json_to_standard_output_is_all_there_is(tmp_path: Path):
    path = build_tiny(CONFIGS["llama"], tmp_path / "tiny")
    words = ["eval", str(path), "--tasks", "none", "--num-windows", "1", "--generate", "0", "--json", "-"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "slimlm", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"][0]["name"] == str(path)
