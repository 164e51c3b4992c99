"""Every command that is printed below a result is one that the program takes, and runs on that result."""

import json
import shlex
from copy import deepcopy
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from slimlm.checkpoint.manifest import Manifest
from slimlm.checkpoint.resolve import BUNDLED
from slimlm.cli import app
from slimlm.recipe import make_recipe
from slimlm.report.next_steps import next_steps
from slimlm.stages import compress
from tests.conftest import CONFIGS, build_tiny
from tests.families.configs import SETTINGS

TEXT = "The old house stood at the end of the lane, and nobody had lived there for years. " * 60
SHARED = {"num_calibration_samples": 16, "max_seq_length": 16, "eval_windows": 2, "dataset": "the text.txt"}
LITTLE = {  # so that each takes a second
    "eval": "--tasks none --num-windows 2 --window 16 --generate 0",
    "recover": "--tokens 512 --max-seq-length 16 --no-measure",
    "bench": "--batch-sizes 1 --prompt-tokens 4 --new-tokens 2 --rounds 1",
    "compress": "--no-measure",
}
SLICE, ROTATE = {"method": "slice", "widths": "mlp=32"}, {"method": "rotate"}
NARROW = {"method": "slice", "widths": "hidden=16"}
RECOVER = {"method": "recover", "tokens": 512}
MIXED = [{"source": "the text.txt", "share": 0.5}, {"source": "self", "share": 0.5}]
# Of each kind of result the steps, what else the recipe says, the family, and the labels of what is printed.
KINDS = {
    "slice": ([SLICE], {}, "llama", "load evaluate recover speed serve quantise"),
    "mixture": ([SLICE], {"dataset": MIXED}, "llama", "load evaluate recover speed serve quantise"),
    "own text": ([SLICE], {"dataset": "self"}, "llama", "load evaluate recover speed serve quantise"),
    "other dtype": ([SLICE], {"dtype": "bfloat16"}, "llama", "load evaluate recover speed serve quantise"),
    "no other program": ([SLICE], {}, "phi3", "load evaluate recover speed serve"),
    "remote code": ([NARROW], {}, "opt", "load evaluate recover speed serve"),
    "pruned": ([{"method": "magnitude", "pattern": "2:4"}], {"dataset": None}, "llama", "load evaluate recover serve"),
    "tiles": (
        [{"method": "magnitude", "pattern": "16x16", "sparsity": 0.5}], {"dataset": None}, "llama",
        "load evaluate recover speed serve",
    ),
    "rotated": ([ROTATE], {}, "llama", "load evaluate cut"),
    "recovered": ([SLICE, RECOVER], {}, "llama", "load evaluate speed serve quantise"),
}  # fmt: skip

SEEN_ELSEWHERE = ("mixture", "own text", "other dtype", "no other program")  # each is another by one word


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("the text.txt").write_text(TEXT)
    return tmp_path


def made(steps: list[dict], more: dict, family: str = "llama") -> Manifest:
    """Of a tiny model that lies in `a model`, written to `it's smaller`."""
    config = CONFIGS["llama"] if family == "llama" else CONFIG_MAPPING[family](**SETTINGS[family])
    build_tiny(config, Path("a model"))
    settings = {"model": "a model", **SHARED, **more, "output_dir": "it's smaller", "steps": steps}
    found = {name: value for name, value in settings.items() if value is not None}
    return compress(make_recipe(found)).manifest


def commands(lines: list[str], program: str) -> list[list[str]]:
    found = [shlex.split(line.partition(" ")[2], comments=True) for line in lines if "from_pretrained" not in line]
    return [words[1:] for words in found if words[0] == program]


def run_little(words: list[str]) -> str:
    done = CliRunner().invoke(app, [*words, *LITTLE[words[0]].split()], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SEEN_ELSEWHERE else kind for kind in KINDS]
)
def test_every_command_runs_on_the_result(kind: str, place: Path):
    steps, more, family, labels = KINDS[kind]
    lines = next_steps(made(steps, more, family), Path("it's smaller"))
    assert [line.split()[0] for line in lines] == labels.split()
    assert len(lines) <= 6
    eval(lines[0].split(maxsplit=1)[1], {"AutoModelForCausalLM": transformers.AutoModelForCausalLM})
    for words in commands(lines, "slimlm"):
        run_little(words)
    for words in commands(lines, "transformers"):
        assert words[:2] == ["serve", "it's smaller"]
        assert words[2:] == (["--trust-remote-code"] if kind == "remote code" else [])
    for words in commands(lines, "python"):
        assert words[1:] == [
            "it's smaller", "--outfile", "it's smaller.gguf", "--outtype", "f16",
            "&&", "llama-quantize", "it's smaller.gguf", "it's smaller-q4.gguf", "Q4_K_M",
        ]  # fmt: skip


def test_what_is_recovered_alone_is_compared_with_its_teacher(place: Path):
    made([SLICE], {})
    words = ["recover", "it's smaller", "--output-dir", "again"]
    said = run_little(words).partition("what next:\n")[2].splitlines()
    assert [line.split()[0] for line in said] == ["load", "evaluate", "speed", "serve", "quantise"]
    assert commands(said, "slimlm")[0] == ["eval", str(place / "again"), "--against", str(place / "a model")]
    for own in commands(said, "slimlm"):
        run_little(own)


def line_of(manifest: Manifest, label: str) -> str:
    lines = next_steps(manifest, Path("out"))
    return next((line.split(maxsplit=1)[1] for line in lines if line.split()[0] == label), "")


def test_data_are_given_again_where_a_flag_can_say_them(place: Path):
    manifest = made([SLICE], {})

    def data(dataset, text_column: str | None = None) -> str:
        manifest["recipe"] |= {"dataset": dataset, "text_column": text_column}
        return line_of(manifest, "recover").removeprefix("slimlm recover out").strip()

    assert data("a b.txt", "note") == "--dataset 'a b.txt' --text-column note"
    assert data("self") == data(None) == ""
    assert data([{"source": "a.txt", "share": None, "windows": 7}]) == "--dataset a.txt"
    two = [{"source": "a.txt", "share": 0.5, "windows": None}, {"source": "self", "share": 0.25, "windows": None}]
    assert data(two) == "--dataset a.txt:0.5,self:0.25"
    counted = [{**part, "share": None, "windows": 8 * (place + 1)} for place, part in enumerate(two)]
    assert data(counted) == "--dataset a.txt:8,self:16"
    assert data("-") == data([{**two[0], "source": "-"}, two[1]]) == ""  # nobody pipes it in again
    manifest["recipe"] |= {"dataset_config": "en", "dataset_split": "test"}
    assert data("me/data") == "--dataset me/data --dataset-config en --dataset-split test"
    manifest["recipe"] |= {"dataset_config": None, "dataset_split": None}
    assert data([two[0], counted[1]]) == data([{**two[0], "source": "a,b.txt"}, two[1]]) == ""


def test_the_dense_model_is_named_as_it_was_given(place: Path):
    manifest = made([SLICE], {})
    manifest["model"] |= {"name": "me/model", "origin": "hub"}
    assert line_of(manifest, "evaluate") == "slimlm eval out --against me/model"
    manifest["recipe"]["revision"] = "v 2"
    assert line_of(manifest, "speed") == "slimlm bench out --against me/model --against-revision 'v 2'"
    own = deepcopy(manifest)
    own["recipe"] |= {"revision": None, "steps": [RECOVER]}
    own["method"] = {"teacher": str(BUNDLED["llama"])}
    assert line_of(own, "evaluate") == "slimlm eval out --against llama"
    assert line_of(own, "quantise") == ""  # its tokenizer is none that the converter knows


def test_what_quantised_files_would_hold_as_it_is_is_not_quantised(place: Path):
    manifest = json.loads(json.dumps(made([SLICE], {})))
    assert "llama-quantize" in line_of(manifest, "quantise")
    manifest["method"]["uneven"] = {"mlp": 20}
    assert line_of(manifest, "quantise") == ""
