"""The real command line in a subprocess, as a user meets it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slimlm.checkpoint.resolve import BUNDLED
from slimlm.cli import app
from slimlm.evaluation.sources import python_reference
from tests.conftest import CONFIGS, build_tiny, logits_of

QUICK = ["--num-calibration-samples", "20", "--max-seq-length", "48", "--eval-windows", "4"]


def slimlm(*arguments: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "slimlm", *arguments], cwd=cwd, capture_output=True, text=True, check=False, **kwargs
    )


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    done = slimlm("compress", "--model", "llama", "--sparsity", "0.25", *QUICK, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr
    assert "6,524,160" in done.stdout
    output = place / "llama-slice-25"
    tensors = load_file(output / "model.safetensors").values()
    assert f"{sum(tensor.numel() for tensor in tensors):,}" in done.stdout
    assert "achieved 0.2" in done.stdout
    return output


def test_the_output_is_all_a_stock_process_needs(compressed: Path, tmp_path: Path):
    script = f"""
import sys
sys.modules["slimlm"] = None  # importing it would fail
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained({str(compressed)!r}, output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
assert type(model).__name__ == "MistralForCausalLM" and model.config.hidden_size < 256
tokenizer = AutoTokenizer.from_pretrained({str(compressed)!r})
inputs = tokenizer("The old house stood", return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])
assert len(text) > 30, text
tokens = torch.arange(40).view(2, 20)
model = AutoModelForCausalLM.from_pretrained({str(compressed)!r}, dtype=torch.float32).eval()
torch.save(model(tokens).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(compressed, torch.arange(40).view(2, 20)))


def test_the_manifest_and_card_hold_what_was_measured(compressed: Path):
    manifest = json.loads((compressed / "slimlm.json").read_text())
    assert manifest["sparsity"]["requested"] == 0.25
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.25, abs=0.01)
    assert manifest["calibration"]["source"] == "self"
    assert manifest["bytes"]["compressed"] == (compressed / "model.safetensors").stat().st_size
    dense, smaller = (manifest["measured"][side]["perplexity"] for side in ("dense", "compressed"))
    assert dense < smaller < 2 * dense
    assert len(manifest["blocks"]) == 6
    assert all(0 < block["relative_error"] < 1 for block in manifest["blocks"])
    card = (compressed / "README.md").read_text()
    assert f"{smaller:.2f}" in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["slimlm", "compression", "slice"]


def test_the_saved_recipe_gives_the_same_bytes_again(compressed: Path, tmp_path: Path, as_shipped):
    """In a process that did other things before, too."""
    words = ["compress", "--recipe", str(compressed / "recipe.yaml"), "-o", str(tmp_path / "repeat")]
    repeat = CliRunner().invoke(app, words)
    assert "output_dir" not in (compressed / "recipe.yaml").read_text()
    assert repeat.exit_code == 0, repeat.output
    original = (compressed / "model.safetensors").read_bytes()
    assert (tmp_path / "repeat" / "model.safetensors").read_bytes() == original


@pytest.mark.slow
def test_eval_agrees_with_lm_evals_own_command_to_every_digit(compressed: Path, tmp_path: Path):
    ours = slimlm(
        "eval", str(compressed), "--against", "llama", "--num-windows", "4", "--limit", "20", "--json", "ours.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr
    assert "python_reference_continuation" in ours.stdout
    entry = json.loads((tmp_path / "ours.json").read_text())["models"][0]
    theirs = subprocess.run(
        [sys.executable, "-m", "lm_eval", *shlex.split(entry["lm_eval_command"])[1:], "--output_path", "theirs.json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    (written,) = tmp_path.glob("theirs*.json")
    scores = json.loads(written.read_text())["results"]["python_reference_continuation"]
    for metric in ("acc", "acc_norm"):
        found = entry["tasks"]["python_reference_continuation"][metric]
        assert found["value"] == scores[f"{metric},none"]
        assert found["stderr"] == scores[f"{metric}_stderr,none"]


def test_compress_and_eval_report_the_same_perplexity(compressed: Path, tmp_path: Path):
    words = ["eval", str(compressed), "--against", "llama", "--tasks", "none", "--num-windows", "4", "--generate", "0"]
    done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "e.json")])
    assert done.exit_code == 0, done.output
    measured = json.loads((compressed / "slimlm.json").read_text())["measured"]
    models = json.loads((tmp_path / "e.json").read_text())["models"]
    for entry, side in zip(models, ("compressed", "dense"), strict=True):
        found = entry["texts"]["python-reference"]["perplexity"]
        assert found == pytest.approx(measured[side]["perplexity"], rel=1e-9)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories, each wrong in one way."""
    place = tmp_path_factory.mktemp("broken")
    for name in ("no-config", "truncated", "nan", "unsupported", "missing-shard", "no-tokenizer", "negative"):
        shutil.copytree(BUNDLED["llama"], place / name)
    (place / "no-config" / "config.json").unlink()
    weights = place / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tensors = load_file(place / "nan" / "model.safetensors")
    tensors["model.norm.weight"][7] = float("nan")
    save_file(tensors, place / "nan" / "model.safetensors", {"format": "pt"})
    edit_config(place / "unsupported", model_type="llama4_text")
    edit_config(place / "negative", hidden_size=-256)
    (place / "missing-shard" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (place / "missing-shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in (place / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    shutil.copytree(BUNDLED["llama"], place / "fp8")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].nan_to_num().to(torch.float8_e4m3fn)
    save_file(tensors, place / "fp8" / "model.safetensors", {"format": "pt"})
    shutil.copytree(BUNDLED["llama"], place / "integers")
    tensors["model.norm.weight"] = torch.ones(256, dtype=torch.int8)
    save_file(tensors, place / "integers" / "model.safetensors", {"format": "pt"})
    numpy.save(place / "big.npy", numpy.full((2, 300), 10**6))
    (place / "empty.txt").write_text("")
    (place / "short.txt").write_text("Only a few words.")
    (place / "full").mkdir()
    (place / "full" / "something").write_text("x")
    (place / "recipe.yaml").write_text("model: llama\nsteps: [{method: slice, sparsity: 0.25, sparsty: 0.3}]\n")
    return place


def edit_config(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


GOOD = ["--model", "llama", "--sparsity", "0.25"]
BAD_INPUT = {
    "sparsity 0": (["-m", "llama", "-s", "0"], "above 0 and below 1"),
    "sparsity 1": (["-m", "llama", "-s", "1"], "above 0 and below 1"),
    "sparsity 1.5": (["-m", "llama", "-s", "1.5"], "above 0 and below 1"),
    "sparsity -0.1": (["-m", "llama", "-s", "-0.1"], "above 0 and below 1"),
    "unreachable sparsity": (["-m", "llama", "-s", "0.0001"], "cannot be reached"),
    "unreachable rounding": (["-m", "llama", "-s", "0.2", "--set", "round_to=64"], "cannot be reached"),
    "no model": (["-s", "0.25"], "--model is missing"),
    "no sparsity": (["-m", "llama"], "--sparsity is missing"),
    "unknown model": (["-m", "lama", "-s", "0.25"], "did you mean 'llama'"),
    "unknown path": (["-m", "./nowhere", "-s", "0.25"], "does not exist"),
    "unreachable hub id": (["-m", "someone/model", "-s", "0.25"], "could not be fetched from the hub"),
    "not a number": (["-m", "llama", "-s", "abc"], "Invalid value for '--sparsity'"),
    "unknown flag": ([*GOOD, "--foo"], "No such option: --foo"),
    "seed too large": ([*GOOD, "--seed", "9" * 30], "seed"),
    "empty dataset": ([*GOOD, "--dataset", ""], "dataset"),
    "integer weights": (["-m", "./integers", "-s", "0.25", "--dataset", "self"], "model.norm.weight"),
    "unknown method": ([*GOOD, "--method", "slise"], "unknown method 'slise'; did you mean 'slice'"),
    "unknown recipe": (["--recipe", "lama-slice-25"], "did you mean 'llama-slice-25'"),
    "unknown recipe key": (["--recipe", "recipe.yaml"], "unknown key 'sparsty'; did you mean 'sparsity'"),
    "unknown dtype": ([*GOOD, "--dtype", "int3"], "dtype"),
    "unknown device": ([*GOOD, "--device", "warp"], "device 'warp' is not available"),
    "no config": (["-m", "./no-config", "-s", "0.25"], "holds no config.json"),
    "missing shard": (["-m", "./missing-shard", "-s", "0.25"], "shard"),
    "truncated shard": (["-m", "./truncated", "-s", "0.25", "--dataset", "self"], "is truncated"),
    "nan": (["-m", "./nan", "-s", "0.25", "--dataset", "self"], "model.norm.weight"),
    "unsupported": (["-m", "./unsupported", "-s", "0.25"], "'llama4_text' is not supported"),
    "absurd config": (["-m", "./negative", "-s", "0.25", "--dataset", "self"], "model"),
    "no tokenizer": (["-m", "./no-tokenizer", "-s", "0.25", "--dataset", "self"], "no tokenizer"),
    "no calibration": (["-m", str(BUNDLED["llama"]), "-s", "0.25"], "no calibration data"),
    "empty calibration": ([*GOOD, "--dataset", "empty.txt"], "empty.txt is empty"),
    "short calibration": ([*GOOD, "--dataset", "short.txt"], "fewer than one window"),
    "calibration not there": ([*GOOD, "--dataset", "nowhere.txt"], "does not exist"),
    "window too long": ([*GOOD, "--max-seq-length", "100000"], "beyond the model's context"),
    "output in use": ([*GOOD, "-o", "full"], "--overwrite"),
    "output unwritable": ([*GOOD, "-o", "/proc/slimlm"], "cannot be created"),
    "output is the input": (["-m", "./nan", "-s", "0.25", "-o", "nan", "--overwrite"], "is or holds an input"),
    "output holds the input": (["-m", "./nan", "-s", "0.25", "-o", ".", "--overwrite"], "is or holds an input"),
    "output is not ours": ([*GOOD, "-o", "full", "--overwrite"], "slimlm did not write"),
    "tokens beyond the vocabulary": ([*GOOD, "--dataset", "big.npy"], "holds tokens"),
    "fp8 weights": (["-m", "./fp8", "-s", "0.25", "--dataset", "self"], "F8_E4M3"),
    "eval text not there": ([*GOOD, "--eval-text", "nowhere.txt"], "cannot be read"),
}


@pytest.fixture(scope="module")
def answers(broken: Path) -> dict[str, tuple[int, str, str]]:
    """Every bad command run in one process, since importing PyTorch thirty times would take minutes."""
    script = """
import contextlib, io, json, sys
from slimlm.cli import main
answers = {}
for name, arguments in json.load(sys.stdin).items():
    sys.argv = ["slimlm", "compress", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code, _ = -1, err.write(f"Traceback {error!r}")
    answers[name] = (code, out.getvalue(), err.getvalue())
print(json.dumps(answers))
"""
    commands = {name: arguments for name, (arguments, _) in BAD_INPUT.items()}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(commands), cwd=broken, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_exit_code_2(answers, name: str):
    code, _, error = answers[name]
    lines = [line for line in error.splitlines() if line.startswith("slimlm: ")]
    assert code == 2, error
    assert len(lines) == 1, error
    assert BAD_INPUT[name][1] in lines[0]
    assert "Traceback" not in error


def test_bad_input_writes_nothing(answers, broken: Path):
    assert answers
    names = {path.name for path in broken.iterdir()}
    assert not {name for name in names if name.startswith("llama") or name.endswith((".partial", ".replaced"))}
    assert [path.name for path in (broken / "full").iterdir()] == ["something"]


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_stopped_run_leaves_nothing_under_the_final_name(tmp_path: Path, stop: signal.Signals):
    (tmp_path / "text.txt").write_text("\n".join(python_reference()))  # long enough to be at work when it is stopped
    process = subprocess.Popen(
        [sys.executable, "-m", "slimlm", "compress", "-m", "llama", "-s", "0.25", "-o", "out", "--dataset", "text.txt"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.partial" / "work" / "journal.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(stop)
    _, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    if stop != signal.SIGKILL:
        assert "interrupted; run the same command with --resume" in error
        assert "Traceback" not in error


def test_a_stopped_run_does_not_wait_for_threads_that_wait_for_one_another(tmp_path: Path):
    script = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from slimlm.__main__ import leave
from slimlm.cli.running import Stopped

def stuck(**_):
    lock, held, pool = threading.Lock(), threading.Event(), ThreadPoolExecutor(1)
    lock.acquire()
    pool.submit(lambda: (held.set(), lock.acquire()))
    held.wait()
    raise Stopped(2)

sys.modules["slimlm.inspection"] = SimpleNamespace(inspect_model=stuck)
sys.argv = ["slimlm", "inspect", "llama"]
leave()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr


def test_help_teaches_and_imports_nothing_heavy():
    script = (
        "import sys, slimlm.cli, slimlm; assert not {'torch', 'transformers', 'datasets', 'lm_eval'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    first = "slimlm compress --model llama --sparsity 0.25"
    for command, example in (
        ([], first),
        (["compress"], first),
        (["eval"], "slimlm eval llama-slice-25 --against llama"),
    ):
        done = slimlm(*command, "--help", cwd=Path.cwd(), env={**os.environ, "COLUMNS": "120"})
        assert done.returncode == 0
        assert example in done.stdout


def test_the_python_api_is_the_same_verbs(tmp_path: Path):
    import slimlm

    recipe = slimlm.one_step(
        model="llama", sparsity=0.125, num_calibration_samples=5, max_seq_length=32, eval_windows=2,
        output_dir=str(tmp_path / "out"), budget="hidden",
    )  # fmt: skip
    result = slimlm.compress(recipe)
    assert result.manifest["changes"] == {"model_type": ["llama", "mistral"], "hidden_size": [256, 224]}
    evaluation = slimlm.evaluate(str(result.output_dir), against="llama", tasks=(), num_windows=2, generate=4)
    compressed, dense = evaluation.models
    assert compressed["parameters"] == 0.875 * dense["parameters"]
    change = evaluation.pairs[0]["texts"]["python-reference"]["log_perplexity_change"]
    before, after = (one["texts"]["python-reference"]["log_perplexity"] for one in (dense, compressed))
    assert 0 < change == pytest.approx(after - before, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, ("float32", "float16")[n % 2]) for n, name in enumerate(sorted(CONFIGS))]
)
def test_every_kind_of_checkpoint_goes_all_the_way(tmp_path: Path, name: str, dtype: str):
    import slimlm

    path = build_tiny(CONFIGS[name], tmp_path / "whole", torch.bfloat16 if dtype == "float32" else torch.float32)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    for file in path.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "sharded" / file.name)
    (tmp_path / "text.txt").write_text("A sentence about nothing in particular, and then one more. " * 60)
    recipe = slimlm.one_step(
        model=str(tmp_path / "sharded"), sparsity=0.54 if "tied" in name else 0.25, round_to=4, dtype=dtype,
        dataset=str(tmp_path / "text.txt"), num_calibration_samples=6, max_seq_length=24, eval_windows=2,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    manifest = slimlm.compress(recipe).manifest
    smaller, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    assert smaller.dtype == getattr(torch, dtype)
    assert manifest["measured"]["compressed"]["dtype"] == dtype
    assert manifest["measured"]["dense"]["dtype"] == str(model.dtype).removeprefix("torch.")
    assert manifest["parameters"]["compressed"] < manifest["parameters"]["dense"]
    for name, side in (("out", "compressed"), ("sharded", "dense")):
        (entry,) = slimlm.evaluate(str(tmp_path / name), tasks=(), num_windows=2, window=24, generate=4).models
        found = entry["texts"]["python-reference"]["perplexity"]
        assert found == pytest.approx(manifest["measured"][side]["perplexity"], rel=1e-9)


def test_the_seed_decides_what_is_sampled(tmp_path: Path):
    import slimlm

    hashes = []
    for seed in (0, 0, 1):
        recipe = slimlm.one_step(
            model="llama", sparsity=0.25, method="wanda", seed=seed, num_calibration_samples=5, max_seq_length=16,
            measure=False, output_dir=str(tmp_path / "out"),
        )  # fmt: skip
        hashes.append(slimlm.compress(recipe, overwrite=True).manifest["calibration"]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tmp_path: Path):
    plain = ["--no-refit", "--set", "weighting=none", "--no-measure", "--dry-run"]
    done = slimlm("compress", "-m", "llama", *QUICK, "--widths", "hidden=192", *plain, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.layers.*.mlp.down_proj.weight: [256, 704] -> [192, 704] bfloat16  x 6" in done.stdout
    for word in ("peak memory: host", "disk:", "time:", "nothing was written"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_mutated_checkpoints_give_a_clear_error_or_a_correct_run():
    script = Path(__file__).parent.parent / "eval" / "fuzz.py"
    done = subprocess.run([sys.executable, str(script), "--cases", "30"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
