"""What `--json` writes: as the schemas in docs/schema/ say it, alone on standard output, and nowhere else but there."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from slimlm.cli import app
from slimlm.compression import CompressResult
from slimlm.errors import UserError
from slimlm.report.outputs import OUTPUTS
from tests.conftest import CONFIGS, build_tiny
from tests.schemas import PLACE, differences, schema_of

TEXT = "The old house stood at the end of the lane, and nobody had lived there. " * 60
DATA = ("--num-calibration-samples", "6", "--max-seq-length", "32", "--eval-windows", "2")
COMMANDS = {command.name: command for command in app.registered_commands}


def told(command: str, *words: str) -> str:
    """What a command says on standard output with `--json -`, which is as documented."""
    name, *more = command.split("-", 1)
    done = CliRunner().invoke(app, [name, *map("--{}".format, more), *words, "--json", "-"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert differences(command, done.stdout) == []
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, text, and a slice of it."""
    place = tmp_path_factory.mktemp("json")
    build_tiny(CONFIGS["llama"], place / "model")
    (place / "text.txt").write_text(TEXT)
    text = str(place / "text.txt")
    words = ["-m", str(place / "model"), "-s", "0.2", "--dataset", text, "--eval-text", text, *DATA]
    found = json.loads(told("compress", *words, "-o", str(place / "slice")))
    manifest = json.loads((place / "slice" / "slimlm.json").read_text())
    assert found == {**manifest, "output_dir": str(place / "slice")}
    return place


def test_the_schemas_are_those_of_the_types():
    found = {path.stem: json.loads(path.read_text()) for path in PLACE.iterdir()}
    assert found == {command: schema_of(command) for command in OUTPUTS}, "python -m tests.schemas"


def test_every_command_has_a_schema_and_the_page_every_key():
    assert OUTPUTS.keys() - {"compress-dry-run"} == COMMANDS.keys()
    docs = PLACE.parent
    page = (docs / "json.md").read_text() + (docs / "output.md").read_text()
    for command in OUTPUTS:
        assert f"(schema/{command}.json)" in page
        for key in keys_in(schema_of(command)):
            assert f"`{key}`" in page, (command, key)


def keys_in(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {key for one in schema for key in keys_in(one)}
    if not isinstance(schema, dict):
        return set()
    own = set(schema["properties"]) if isinstance(schema.get("properties"), dict) else set()
    return own.union(*map(keys_in, schema.values()))


def test_what_is_not_as_documented_is_seen():
    """The law by which all others here stand."""
    good = {"source": "a", "output_dir": "b", "bytes_before": 2, "bytes_after": 1}
    assert differences("pack", json.dumps(good)) == []
    assert differences("pack", json.dumps({**good, "more": 1})) == ["pack.more"]
    with pytest.raises(ValidationError):
        differences("pack", json.dumps({**good, "bytes_after": "1"}))


def test_several_steps_are_told_like_one(place: Path):
    steps = "\n".join(
        ["- {method: slice, sparsity: 0.2}", "- {method: wanda, sparsity: 0.5}", "- {method: recover, tokens: 64}"]
    )
    recipe = f"model: {place / 'model'}\ndataset: {place / 'text.txt'}\nmax_seq_length: 32\nmeasure: false\nsteps:\n"
    (place / "recipe.yaml").write_text(recipe + steps)
    words = ["--recipe", str(place / "recipe.yaml"), "--num-calibration-samples", "6", "-o", str(place / "several")]
    assert len(json.loads(told("compress", *words))["stages"]) == 2


def test_a_rotation_and_a_recovery_are_told(place: Path):
    text = str(place / "text.txt")
    told("rotate", "-m", str(place / "model"), "--dataset", text, *DATA[:4], "-o", str(place / "rotated"))
    words = ["--dataset", text, "--max-seq-length", "32", "--eval-windows", "2", "--eval-text", text, "--tokens", "640"]
    found = json.loads(told("recover", str(place / "slice"), *words, "-o", str(place / "recovered")))
    assert found["measured"]["text"] == text


@pytest.mark.parametrize("words", [["-s", "0.25"], ["--method", "magnitude", "--pattern", "2:4"]])
def test_a_dry_run_is_told(place: Path, words: list[str], in_process):
    text, output = str(place / "text.txt"), str(place / "never")
    data = [] if "magnitude" in words else ["--dataset", text]
    model = ["-m", str(place / "model"), "--eval-text", text, *DATA, "-o", output]
    found = json.loads(told("compress-dry-run", *model, *words, *data))
    assert found["output_dir"] == output
    assert found["seconds"] > 0
    shapes = {one["name"]: one for one in found["shapes"]}
    gate = shapes["model.layers.*.mlp.gate_proj.weight"]
    assert (gate["dense"], gate["dtype"], gate["count"]) == ([48, 32], "float32", 3)
    assert bool(found["candidates"]) == ("-s" in words)
    assert (found["calibration"] is None) == ("magnitude" in words)
    assert not (place / "never").exists()


def test_an_evaluation_and_a_bench_are_told(place: Path):
    words = [str(place / "slice"), "--against", str(place / "model"), "--text", str(place / "text.txt")]
    words += ["--num-windows", "2", "--window", "24", "--generate", "4"]
    found = json.loads(told("eval", *words, "--limit", "3", "--fragile", "1"))
    assert found["pairs"][0]["tasks"]
    alone = json.loads(told("eval", *words[:1], *words[3:], "--tasks", "none", "--corrupt", "case"))
    assert alone["pairs"] == []
    speed = json.loads(
        told("bench", *words[:3], "--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "3", "--batch-sizes", "1")
    )
    assert speed["models"][0]["batches"][0]["rounds"][0].keys() == {"first", "steps", "memory"}


def test_matrices_are_told(place: Path):
    told("inspect", str(place / "slice"))
    told("inspect", str(place / "model"), "--dataset", str(place / "text.txt"), "--windows", "2", "--window", "24")


def test_packing_is_told(place: Path):
    packed = json.loads(told("pack", str(place / "slice"), str(place / "packed")))
    unpacked = json.loads(told("unpack", str(place / "packed"), str(place / "again")))
    assert packed["bytes_before"] == unpacked["bytes_after"]
    assert unpacked["output_dir"] == str(place / "again")


@pytest.mark.parametrize("command", ["models", "methods", "recipes"])
def test_lists_are_told(command: str):
    assert json.loads(told(command))[command]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_file_that_cannot_be_written_is_said_before_any_work(command: str, tmp_path: Path):
    words = {
        "compress": ["-m", "llama", "-s", "0.5", "-o", str(tmp_path / "out")],
        "rotate": ["-m", "llama", "-o", str(tmp_path / "out")],
        "pack": ["llama", str(tmp_path / "out")],
        "unpack": ["llama", str(tmp_path / "out")],
    }
    usual = ["llama"] if command in ("recover", "eval", "bench", "inspect") else []
    for more in ([], ["--dry-run"]) if command == "compress" else ([],):
        done = CliRunner().invoke(
            app, [command, *words.get(command, usual), *more, "--json", str(tmp_path / "no" / "x")]
        )
        assert isinstance(done.exception, UserError)
        assert str(done.exception).startswith("--json ")
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_one_writes(rank: int, place: Path, tmp_path: Path, monkeypatch):
    manifest = json.loads((place / "slice" / "slimlm.json").read_text())
    monkeypatch.setattr("slimlm.stages.compress", lambda **_: CompressResult(place / "slice", manifest))
    for module in ("compress", "running"):
        monkeypatch.setattr(f"slimlm.cli.{module}.own_rank", lambda: rank)
    file = tmp_path / "x.json"
    done = CliRunner().invoke(app, ["compress", "-m", "llama", "-s", "0.2", "--json", str(file)])
    assert done.exit_code == 0, done.exception
    assert file.exists() == bool(done.stdout) == (rank == 0)
