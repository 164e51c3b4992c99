import json
from pathlib import Path

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.cli import app
from slimlm.errors import UserError
from slimlm.evaluation.evaluate import Evaluation, evaluate
from slimlm.evaluation.samples import recomputed
from tests.conftest import CONFIGS, build_tiny

FEW = {"num_windows": 3, "window": 32, "generate": 6, "limit": 8, "fragile": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def found(place: Path) -> Evaluation:
    path = build_tiny(CONFIGS["llama"], place / "tiny")
    return evaluate(str(path), str(BUNDLED["llama"]), log_samples=place / "kept", corrupt=("typos",), **FEW)


def plain(data: dict) -> dict:
    return json.loads(json.dumps(data, default=str))


def test_every_figure_can_be_had_from_the_samples(found: Evaluation, place: Path):
    again = recomputed(place / "kept", fragile=2)
    for name in ("models", "pairs", "written"):
        assert plain(again[name]) == plain(found.data[name])
    assert found.pairs[0]["fragile"]["texts"]["python-reference+typos"]


def test_the_samples_are_what_lm_eval_logs(found: Evaluation, place: Path):
    rows = (place / "kept/models/0/questions-0.jsonl").read_text().splitlines()
    samples = [json.loads(row) for row in rows]
    assert len(samples) == FEW["limit"]
    score = found.models[0]["tasks"]["python_reference_continuation"]["acc"]["value"]
    assert sum(sample["acc"] for sample in samples) / len(samples) == score


def test_samples_do_not_go_into_what_is_there(place: Path, tmp_path: Path):
    (tmp_path / "mine").write_text("something")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="--log-samples .*there already"):
            evaluate("llama", tasks=(), log_samples=target, **{**FEW, "fragile": 0})
    assert (tmp_path / "mine").read_text() == "something"


def test_what_is_not_whole_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="holds no whole samples"):
        recomputed(tmp_path)


def test_figures_outlive_samples_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """In Python and on the command line."""

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("slimlm.evaluation.samples.save", full)
    few = {"tasks": (), "num_windows": 2, "window": 32, "generate": 0}
    found = evaluate("llama", log_samples=tmp_path / "a", **few)
    assert "--log-samples" in str(found.unsaved)
    assert found.models[0]["texts"]
    words = ["eval", "llama", "--tasks", "none", "--num-windows", "2", "--window", "32", "--generate", "0"]
    done = CliRunner().invoke(app, [*words, "--log-samples", str(tmp_path / "b"), "--json", str(tmp_path / "x.json")])
    assert done.exit_code == 1
    assert "bits per byte" in done.output
    assert json.loads((tmp_path / "x.json").read_text())["models"][0]["name"] == "llama"
